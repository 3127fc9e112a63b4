"""Record → transform → loader; tokenizers, preprocessing, sources, and the embedded world."""
