"""The rule language: placeholders, stacking, self-check of tables, composition."""

from __future__ import annotations

import numpy as np
import pytest

from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.interop.binding import bind, source_shapes
from perception_jax.interop.rules import (
    LINEAR,
    SPLIT_LINEAR,
    Concat,
    Constant,
    Ignore,
    Rename,
    Rule,
    RuleTable,
    conv,
    embedding,
    identity_table,
    linear,
    norm,
)


def shapes_of(*rules: Rule, **leaves: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    paths = {path.replace("__", "/"): shape for path, shape in leaves.items()}
    return source_shapes(RuleTable(rules=rules), paths)


def test_layers_are_stacked_where_the_target_has_no_placeholder():
    found = shapes_of(
        *linear("layers.{i}.fc", "blocks/fc"), blocks__fc__kernel=(2, 3, 5), blocks__fc__bias=(2, 5)
    )
    assert found == {
        "layers.0.fc.weight": (5, 3),
        "layers.1.fc.weight": (5, 3),
        "layers.0.fc.bias": (5,),
        "layers.1.fc.bias": (5,),
    }


def test_a_placeholder_in_both_is_copied_and_another_is_stacked():
    rule = Rule("layers.{i}.blocks.{j}.w", "stages/{i}/blocks/w")
    found = shapes_of(rule, stages__0__blocks__w=(2, 4), stages__10__blocks__w=(1, 8))
    assert found == {
        "layers.0.blocks.0.w": (4,),
        "layers.0.blocks.1.w": (4,),
        "layers.10.blocks.0.w": (8,),
    }


def test_layers_numbered_with_a_stride():
    found = shapes_of(Rule("tower.{3*i+1}.w", "bert/w"), bert__w=(2, 4))
    assert list(found) == ["tower.1.w", "tower.4.w"]


def test_eva_attention_without_a_key_bias():
    rules = (
        Rule("qkv.weight", ("q/kernel", "k/kernel", "v/kernel"), SPLIT_LINEAR),
        Rule("q_bias", "q/bias"),
        Rule((), "k/bias", Constant(0.0)),
        Rule("v_bias", "v/bias"),
    )
    leaves = {f"{n}__kernel": (4, 4) for n in "qkv"} | {f"{n}__bias": (4,) for n in "qkv"}
    assert shapes_of(*rules, **leaves) == {"qkv.weight": (12, 4), "q_bias": (4,), "v_bias": (4,)}


def test_parts_of_unequal_size_follow_from_our_shapes():
    rule = Rule("qkv", ("q", "k", "v"), SPLIT_LINEAR)  # grouped queries: fewer keys than queries
    assert shapes_of(rule, q=(8, 8), k=(8, 2), v=(8, 2)) == {"qkv": (12, 8)}
    rule = Rule(("gate", "up"), "gate_up", Concat(2))
    assert shapes_of(rule, gate_up=(6,)) == {"gate": (3,), "up": (3,)}


def test_short_forms():
    rules = (*conv("c", "c", bias=False), *norm("n", "n"), *embedding("e", "e"))
    found = shapes_of(
        *rules, c__kernel=(7, 5, 3, 2), n__scale=(4,), n__bias=(4,), e__embedding=(9, 4)
    )
    assert found == {"c.weight": (2, 3, 7, 5), "n.weight": (4,), "n.bias": (4,), "e.weight": (9, 4)}


@pytest.mark.parametrize(
    ("rules", "leaves", "message"),
    [
        ([], ["a"], "a has no rule"),
        ([Rule("x", "a"), Rule("y", "a")], ["a"], "a has two rules"),
        ([Rule("x", "a"), Rule("x", "b")], ["a", "b"], "x is claimed by"),
        ([Rule("x.{i}", "a"), Rule("x.1", "b")], ["a", "b"], "x.1 is claimed by"),
        ([Rule("x", "a", copies=("y",)), Rule("y", "b")], ["a", "b"], "y is claimed by"),
        ([Rule("x", ("a", "b"), SPLIT_LINEAR)], ["a"], "does not have"),
        ([Rule("x", "a", Concat(2))], ["a"], "makes 2 tensors"),
        ([Rule("x", "a", Concat(3))], ["a"], "does not fit"),
    ],
)
def test_self_check(rules, leaves, message):
    with pytest.raises(CheckpointError, match=message):
        bind(RuleTable(rules=tuple(rules)), dict.fromkeys(leaves, (4, 4)))


def test_self_check_tells_all_problems_at_once():
    table = RuleTable(rules=(Rule("x", "a"), Rule("y", "a"), Rule("z", "b", LINEAR)))
    with pytest.raises(CheckpointError) as caught:
        bind(table, {"a": (1,), "b": (1,), "c": (1,)})
    for problem in ("a has two rules", "does not fit ('b',)", "c has no rule"):
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ("w", "blocks/{i}/w"),
        ("a.{i}.{j}.w", "w"),
        ("a.{i", "w"),
        ("a.{i}.w", "blocks/{2*i}/w"),
        ("a.{i}.w", ("blocks/{i}/q", "blocks/k")),
        (("a", "b.{i}"), "w"),
        ("a", ()),
    ],
)
def test_rules_that_make_no_sense(arguments):
    with pytest.raises(ConfigError):
        Rule(*arguments)


def test_a_table_as_part_of_a_larger_one():
    tower = RuleTable(
        rules=(Rule("w.{i}", "w", copies=("v.{i}",)),),
        ignored=(Ignore("*.ids", "a range"),),
        renames=(Rename(r"^old\.", "new."),),
        buffers={"table": np.arange(3)},
    )
    host = RuleTable(rules=(Rule("head", "head"),)) + tower.under("vision.", "tower/")
    assert source_shapes(host, {"head": (2,), "tower/w": (1, 5)}) == {
        "head": (2,),
        "vision.w.0": (5,),
        "vision.table": (3,),
    }
    assert host.ignored_because("vision.a.ids") == "a range"
    assert host.ignored_because("a.ids") is None
    assert host.original("vision.v.7") == "vision.w.7"
    assert host.rename("module.vision.old.x") == "vision.new.x"
    assert host.rename("old.x") == "old.x"


def test_our_own_layout():
    leaves = {"vision/blocks/fc1/kernel": (2, 3, 4), "scale": ()}
    assert source_shapes(identity_table(leaves), leaves) == leaves
