"""Devices: the mesh, path rules that place every leaf on it, distributed start-up, FLOPs."""
