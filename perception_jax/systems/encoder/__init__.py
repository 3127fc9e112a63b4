"""What an image encoder sees: see README.md beside this file."""
