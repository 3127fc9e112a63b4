"""Programs run on two of the eight devices: data are split, and what is not is computed twice."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _two_devices() -> Iterator[None]:
    two = jax.devices()[:2]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("devices", "local_devices"):
            patch.setattr(jax, name, lambda *_, **__: two)
        for name in ("device_count", "local_device_count"):
            patch.setattr(jax, name, lambda *_, **__: len(two))
        yield
