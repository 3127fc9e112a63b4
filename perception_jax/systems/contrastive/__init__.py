"""Contrastive image-text training: see README.md beside this file."""
