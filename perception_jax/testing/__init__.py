"""Tiny models, tasks and records for tests and notebooks."""
