"""Which settings of a run may change when it is resumed."""

from __future__ import annotations

from launch.train import MAY_CHANGE
from perception_jax.train.config import TrainConfig
from perception_jax.train.run_settings import RunSettings, compare

TRAINER = TrainConfig(steps=1, batch_size=2)


def settings(**config) -> RunSettings:
    return RunSettings.of(TRAINER, config, config, MAY_CHANGE)


def test_what_is_recomputed_may_change_and_the_rate_may_not():
    """Runs from before policies had names kept a bool."""
    old = settings(remat=False, optim=1).to_json()
    for now in ("none", "full", {"vision": "full", "text": "none"}):
        assert compare(old, settings(remat=now, optim=1)).forbidden == []
    assert compare(old, settings(remat="none", optim=2)).forbidden == ["optim: 1 before, 2 now"]
