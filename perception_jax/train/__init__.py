"""The trainer: task protocol, config, optimizer, step, loop, checkpoints, metrics.

`loop.run(task, config, workdir)` trains; `restore.load_model(task, workdir)` gives the trained
model back; `metrics.read_metrics(workdir)` gives the curves.
"""
