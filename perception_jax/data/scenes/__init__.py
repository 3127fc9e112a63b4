"""Scenes: a synthetic dataset of composed emoji drawings with complete annotations.

    from perception_jax.data.scenes.sample import SceneConfig
    from perception_jax.data.scenes.source import ScenesSource

    record = ScenesSource(SceneConfig(canvas=128, split="train"), seed=0, length=10_000)[0]

`spec` says what a scene is; `sample` draws one at random, `render` turns it into pixels, boxes and
masks, `language` into words, `pairs` edits it in one respect. Four artists' drawings train; the
fifth's, and the held-out concepts, only test. Licences of the drawings: `assets/licences`.
"""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "pairs": ("PairSource", "minimal_pair"),
        "sample": ("SceneConfig", "sample_spec"),
        "source": ("ScenesSource", "portrait", "scene_record"),
        "spec": ("Background", "Placement", "STYLES", "SceneSpec", "TEST_STYLE", "TRAIN_STYLES"),
    },
)
