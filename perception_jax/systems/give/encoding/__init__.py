"""Many images under many instructions, in steps of one shape."""
