"""Names of GiVE's own parameters in safetensors: `ag_adapters.{l}.*`.

The names are this library's resolution; the paper's code could not be had. Reference names, should
they turn up, are mapped by `renames` before anything else is looked at.
"""

from __future__ import annotations

from perception_jax.interop.rules import Rule, linear, norm


def adapter_rules(source: str, target: str, *, gate: bool) -> tuple[Rule, ...]:
    """Of one `AgAdapter`, or of a stack of them if `source` has a placeholder."""
    rules = (
        *norm(f"{source}.norm", f"{target}/norm"),
        *linear(f"{source}.mlp.fc1", f"{target}/fc1"),
        *linear(f"{source}.mlp.fc2", f"{target}/fc2"),
        *(
            rule
            for name in ("to_q", "to_k", "to_v")
            for rule in linear(f"{source}.{name}", f"{target}/{name}", bias=False)
        ),
        *linear(f"{source}.to_out", f"{target}/to_out"),
    )
    return (*rules, Rule(f"{source}.gate", f"{target}/gate")) if gate else rules
