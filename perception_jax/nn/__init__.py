"""Layers that two or more models use, and taps for their intermediate values."""
