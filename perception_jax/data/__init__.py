"""Records, transforms and loaders; tokenizers, preprocessing, dataset sources, and scenes."""
