"""Scenes per second and core, sampling and rendering included, with and without language.

python tests/bench/scenes.py [--seconds 4]
"""

from __future__ import annotations

import argparse
import time

from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.source import ScenesSource

WARM_UP = 400
"""Scenes after which nearly every drawing is decoded."""


def rate(config: SceneConfig, seconds: float) -> float:
    """Scenes per second of processor time: other processes on the machine do not count."""
    source = ScenesSource(config, seed=0, length=10**9)
    for k in range(WARM_UP):
        source[k]
    start, k = time.process_time(), 0
    while time.process_time() - start < seconds:
        source[WARM_UP + k]
        k += 1
    return k / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0)
    seconds = parser.parse_args().seconds
    print("canvas  pictures only  with language   (scenes/s/core)")
    for canvas in (64, 128, 224):
        silent = rate(SceneConfig(canvas=canvas, language="none"), seconds)
        spoken = rate(SceneConfig(canvas=canvas), seconds)
        print(f"{canvas:6}  {silent:13.0f}  {spoken:13.0f}")


if __name__ == "__main__":
    main()
