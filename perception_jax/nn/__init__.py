"""Layers that two or more models use, and the taps that look inside them."""
