"""One method per folder; no system imports another.

Each system exports its public names (`from perception_jax.systems.give import GiveEncoder`); they
are imported when they are first used, so that importing `program.py` of a system stays light.
"""
