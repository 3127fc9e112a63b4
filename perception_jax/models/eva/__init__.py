"""EVA-CLIP: see README.md beside this file."""
