"""Scores of an encoder that instructions steer: naming, deciding, retrieval, copy diagnostics."""
