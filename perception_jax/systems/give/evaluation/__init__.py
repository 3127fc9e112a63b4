"""Protocols on a model, and what can be left out of its training."""
