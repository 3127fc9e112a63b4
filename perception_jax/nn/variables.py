"""Kinds of parameters: what trains is chosen by type (`Task.trainable`), not by name."""

from __future__ import annotations

from flax import nnx


class AdapterParam(nnx.Param):
    """A parameter that a method adds to a frozen model."""
