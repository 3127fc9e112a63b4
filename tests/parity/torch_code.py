"""The PyTorch code that models are compared with: `timm` and `open_clip`, imported without
torchvision, of which there is no build for CPUs everywhere; and what the comparisons share.

Both import torchvision for image transforms and one norm layer that no model here has. A module
that only has the names stands in for it while they are imported.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest

_NAMES = (
    "torchvision",
    *(f"torchvision.{name}" for name in ("datasets", "models", "ops", "transforms", "utils")),
    "torchvision.models.feature_extraction",
    "torchvision.ops.misc",
    "torchvision.transforms.functional",
)


class _InterpolationMode(enum.Enum):
    NEAREST, BILINEAR, BICUBIC, LANCZOS, BOX, HAMMING = (
        *("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"),
    )


class _Absent:
    def __init__(self, *_, **__):
        raise RuntimeError("this needs torchvision, which only stands in here")


class _StandIn(types.ModuleType):
    """A module in which every public name is a class that cannot be used."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _InterpolationMode if name == "InterpolationMode" else _Absent


@contextlib.contextmanager
def _torchvision() -> Iterator[None]:
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    with contextlib.suppress(ImportError):
        # open_clip imports transformers, which must not take the stand-in for the real thing: it
        # remembers what it finds first.
        from transformers.utils import is_torchvision_available

        is_torchvision_available()
    for name in _NAMES:
        module = _StandIn(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for name in _NAMES:
            del sys.modules[name]


@functools.cache
def timm() -> types.ModuleType:
    """The package, or a skip where it is not installed."""
    pytest.importorskip("torch")
    with _torchvision():
        return pytest.importorskip("timm")


@functools.cache
def open_clip() -> types.ModuleType:
    """The package, or a skip where it or timm is not installed."""
    timm()
    with _torchvision():
        return pytest.importorskip("open_clip")


def randomised(model, scale: float = 0.05):
    """Fresh biases, norms and factors are zeros and ones, which hide mistakes."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def assert_bit_equal(before, after) -> None:
    """The same names with the same bits."""
    import torch

    before, after = before.state_dict(), after.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def channels_first(pixels: np.ndarray):
    """[B, H, W, 3] numpy to [B, 3, H, W] torch."""
    import torch

    return torch.tensor(pixels.transpose(0, 3, 1, 2))
