"""DINOv2: see README.md beside this file."""
