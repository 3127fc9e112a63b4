"""Small safetensors files and JSON that cost hours or gigabytes to a careless reader."""

from __future__ import annotations

import json
import struct

import jax
import numpy as np
import pytest

from perception_jax.errors import CheckpointError
from perception_jax.interop.load import load_params
from perception_jax.interop.rules import identity_table
from tests.bounded import outcomes

EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def many(count: int) -> str:
    return ", ".join(f'"t{k}": 0' for k in range(count))


HEADERS = {
    "keys that repeat late": f'{{{many(60_000)}, "t59999": 1}}',
    "keys that repeat late in an entry": f'{{"a": {{{many(60_000)}, "t59999": 1}}}}',
    "checksums nested deeply": json.dumps({"__metadata__": {"crc32": "[" * 100_000}, "a": EMPTY}),
    "checksums that repeat late": json.dumps(
        {"__metadata__": {"crc32": f'{{{many(60_000)}, "t59999": 1}}'}, "a": EMPTY}
    ),
    "a long name": json.dumps({"n" * 500_000: EMPTY}),
    "an empty tensor of huge sides": json.dumps({"a": EMPTY | {"shape": [0, *[2**47] * 30]}}),
    "a number of many digits": f'{{"a": {"9" * 5000}}}',
    "a shape of many sizes": json.dumps({"a": EMPTY | {"shape": [1] * 200_000}}),
    "millions of lists": '{"a": [' + "[]," * 5_000_000 + "[]]}",
}


def test_headers(tmp_path):
    files = []
    for number, header in enumerate(HEADERS.values()):
        raw = header.encode()
        files.append(tmp_path / f"{number}.safetensors")
        files[-1].write_bytes(struct.pack("<Q", len(raw)) + raw)
    module = "perception_jax.interop.safetensors_io"
    for name, end in zip(HEADERS, outcomes(module, "SafetensorsFile", files), strict=True):
        assert end.kind == "PerceptionError", (name, end)
        assert len(end.message) < 600, (name, end)


@pytest.mark.timeout(60)  # comparing all of them would take hours
def test_names_that_are_slow_to_compare():
    names = [f"{'ab' * 400}{k:05d}{'ba' * 90}" for k in range(5_000)]
    files = dict.fromkeys(names, np.zeros(1, np.float32))
    leaf = jax.ShapeDtypeStruct((1,), np.float32)
    wanted = {f"{'ab' * 90}{k}{'ba' * 400}": leaf for k in range(9)}
    with pytest.raises(CheckpointError, match="unknown: 5000, missing: 9") as caught:
        load_params(identity_table(wanted), files, wanted)
    assert len(str(caught.value)) < 40_000
