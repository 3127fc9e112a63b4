"""Other ways to run our towers, to be measured beside the one in the library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from perception_jax.nn.attention import core


@contextlib.contextmanager
def patched(names: str) -> Iterator[None]:
    """The library changed in the `+`-joined ways of `VARIANTS` while a call is traced."""
    before = core.attend, core._has_cudnn, jax.lax.scan
    for name in names.split("+"):
        VARIANTS[name]()
    try:
        yield
    finally:
        core.attend, core._has_cudnn, jax.lax.scan = before


def _xla() -> None:
    core._has_cudnn = lambda: False


def _dpa() -> None:
    def attend(q, k, v, mask=None, *, bias=None):
        return jax.nn.dot_product_attention(q, k, v, bias, mask, implementation="xla")

    core.attend = attend


def _unroll() -> None:
    scan = jax.lax.scan
    jax.lax.scan = lambda body, x, xs: scan(body, x, xs, unroll=True)


VARIANTS = {"xla": _xla, "dpa": _dpa, "unroll": _unroll}
"""Attention without cuDNN; jax's own plain attention; the loop over layers unrolled by XLA."""
