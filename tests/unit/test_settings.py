"""Settings from files: every value is of its kind and in range, or one error names it."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from perception_jax import settings
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.settings import Choice, Integer, Number, Optional, Settings, Several

NONSENSE = [
    *(None, True, False, "no", "12", "", [], {}, [1, [2]], (), object()),
    *(-1, 2**80, 10**5000, -0.5, 1e300, math.nan, math.inf, -math.inf, 12.0 + 1e-9),
]


def good(kind):
    return {settings.WIDTH: 768, settings.EPS: 1e-6, settings.MEAN: [0.5, 0.5, 0.5]}[kind]


@pytest.mark.parametrize("kind", [settings.WIDTH, settings.EPS, settings.MEAN])
def test_nonsense_is_named(kind):
    assert Settings({"key": good(kind)}, "config.json").get("key", kind)
    for value in NONSENSE:
        with pytest.raises(ConfigError, match=r"^config\.json: key: expected .*, found ") as caught:
            Settings({"key": value}, "config.json").get("key", kind)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("kind", "value", "read"),
    [
        (Integer(0, 3), np.int64(3), 3),
        (Number(low=0.0), 2, 2.0),
        (Number(above=-1.0, high=0.5), np.float32(0.5), 0.5),
        (Several(Integer(0, 9), 1, 3), [1, 2], (1, 2)),
        (Optional(Integer(0, 9)), None, None),
        (Choice(("a", 1)), 1, 1),
        (settings.FLAG, False, False),
        (settings.TEXT, "", ""),
    ],
)
def test_values_become_pythons_own(kind, value, read):
    found = settings.check(value, kind, "x")
    assert found == read
    assert type(found) is type(read)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Integer(0, 3), 4),
        (Number(above=0.0), 0.0),
        (Number(low=0.0, high=1.0), 1.001),
        (Choice((1, "a")), True),
        (Choice(("a",)), ["a"]),
        (Several(Integer(0, 9), 1, 3), []),
        (Several(Integer(0, 9), 1, 3), [1] * 4),
        (Several(Integer(0, 9), 1, 3), "123"),
        (Optional(Integer(0, 9)), False),
        (settings.FLAG, 1),
        (settings.FLAG, "no"),
        (settings.TEXT, "x" * 5000),
        (settings.STD, [1.0, 0.0, 1.0]),
    ],
)
def test_bounds(kind, value):
    with pytest.raises(ConfigError, match=r"^x: expected .*, found "):
        settings.check(value, kind, "x")


def test_sections_and_missing_keys():
    file = Settings({"vision": {"width": 0}, "text": None}, "c.json", error=CheckpointError)
    assert file.get("depth", settings.DEPTH, 12) == 12
    assert "vision" in file
    assert file.section("text", optional=True).content == {}
    for read, message in (
        (
            lambda: file.get("depth", settings.DEPTH),
            "c.json: expected the key 'depth'.*'vision'",
        ),
        (lambda: file.section("text"), "c.json: text: expected an object"),
        (lambda: file.section("audio"), "c.json: expected the key 'audio'"),
        (lambda: file.section("vision").get("width", settings.WIDTH), "c.json: vision: width: "),
        (lambda: Settings([1], "c.json", error=CheckpointError), "c.json: expected an object"),
        (lambda: Settings({1: 2}, "c.json", error=CheckpointError), "c.json: expected an object"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read()


def test_fields_that_belong_together():
    @dataclasses.dataclass(frozen=True)
    class Tower:
        width: int = 64
        depth: int = 1
        heads: int = 4
        mlp_dim: int = 8
        eps: float = 1e-6
        image_size: int = 8
        patch_size: int = 4

    settings.check_fields(Tower(), settings.IMAGE_TOWER)
    for change, message in (
        ({"heads": 5}, "divides the width 64, found 5"),
        ({"patch_size": 9}, "no larger than the image"),
        ({"depth": 10**9}, r"Tower\.depth: expected an integer of 1 to 1024"),
        ({"eps": math.nan}, r"Tower\.eps"),
        ({"image_size": -48}, r"Tower\.image_size"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings.check_fields(Tower(**change), settings.IMAGE_TOWER)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "valid JSON"),
        (b"\xff{}", "valid JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "repeated key 'c'"),
        (b"[" * 100_000, "valid JSON"),
        (b"[" * 100 + b"]" * 100, "64 lists and objects"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "64 lists and objects"),
        (b"1" * 5000, "valid JSON"),
        (b"[" + b"[]," * 2**22 + b"1]", "4194305 brackets"),
    ],
)
def test_json_that_is_none_or_hostile(raw, message):
    with pytest.raises(ConfigError, match=f"^tokenizer.json: expected .*{message}"):
        settings.parse_json(raw, "tokenizer.json")


def test_json(tmp_path):
    value = {"a": [1, 2.5, None, "\u2028"], "b": [[]] * 1000}
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())
    assert settings.read_json(path) == value
    assert settings.parse_json("\ufeff[1]", "x") == [1]
    with pytest.raises(CheckpointError, match=r"missing\.json"):
        settings.read_json(tmp_path / "missing.json", error=CheckpointError)


@pytest.mark.timeout(30)  # in quadratic time, minutes
def test_repeated_keys_are_found_in_linear_time():
    pairs = ",".join(f'"k{k}": 1' for k in range(200_000))
    with pytest.raises(ConfigError, match="repeated key 'k199999'"):
        settings.parse_json(f'{{{pairs},"k199999": 2}}', "x")


def test_what_is_shown_of_a_value_is_short():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    loop: list = []
    loop.append(loop)
    for value in (deep, loop, 10**5000, [10**5000], "x" * 10**6, {"a": deep}, [[1] * 99] * 99):
        assert len(settings.shown(value)) <= 120


@pytest.mark.parametrize(
    ("kind", "value"), [(settings.EPS, 1e-320), (settings.STD, [0.2, 1e-320, 0.2])]
)
def test_numbers_that_are_zero_in_float32_are_refused(kind, value):
    """Pixels would become infinite, and a norm would divide by zero."""
    with pytest.raises(ConfigError, match="above 1e-"):
        Settings({"key": value}, "config.json").get("key", kind)
