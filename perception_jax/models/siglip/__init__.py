"""SigLIP: see README.md beside this file."""
