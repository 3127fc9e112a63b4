"""Exceptions of the library.

Every message says what was expected, what was found, where, and what to do next.
"""

from __future__ import annotations


class PerceptionError(Exception):
    """Base class of every error that the library raises on purpose."""


class ConfigError(PerceptionError):
    """A setting is unknown, missing or contradicts another one."""


class DataError(PerceptionError):
    """A record, an annotation file or a data source cannot be used."""


class ImageError(DataError):
    """An image cannot be decoded (truncated, empty, not an image, too large)."""


class CheckpointError(PerceptionError):
    """A checkpoint is missing, damaged, refused or does not fit the model."""


class TrainingError(PerceptionError):
    """Training cannot go on (NaN loss, workdir in use, too many bad records)."""
