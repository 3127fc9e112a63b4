"""The trainer: task protocol, config, optimizer, step, loop, checkpoints, metrics.

`loop.run(task, config, workdir)` trains; `restore.load_model(task, workdir)` gives the trained
model back; `metrics.read_metrics(workdir)` gives the curves.
"""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "config": ("OptimConfig", "OptimRule", "TrainConfig"),
        "loop": ("TrainResult", "run"),
        "metrics": ("read_metrics",),
        "restore": ("load_model",),
        "task": ("Batch", "Evaluator", "Metrics", "Task"),
    },
    submodules=("config", "loop", "metrics", "restore", "task"),
)
