"""The process in which `launch.plan` compiles: reads a request from stdin, prints a plan as JSON.

JAX decides at its start which platforms it uses, so that compiling for a slice needs a process of
its own.
"""

from __future__ import annotations

import json
import sys

import ml_collections


def main() -> int:
    """Returns 0 with a plan on the last line of stdout, or 1 with an error there."""
    from launch.systems import planning_program
    from perception_jax.errors import PerceptionError
    from perception_jax.shard import slices
    from perception_jax.train.config import TrainConfig
    from perception_jax.train.plan import make_plan

    request = json.load(sys.stdin)
    config = ml_collections.ConfigDict(request["config"])
    try:
        found = slices.find(request["slice"])
        task, batch = planning_program(config).shapes(config)
        settings = TrainConfig.from_mapping(config.train.to_dict())
        plan = make_plan(task, settings, batch, found, slices.devices(found))
    except PerceptionError as error:
        print(json.dumps({"error": str(error)}))
        return 1
    print(json.dumps({"plan": plan.to_json()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
