"""Answers in lmms-eval's format, for benchmarks whose scores are not computed here.

lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval) keeps the answers to a task in a file
`<time>_samples_<task>.jsonl`; other tools read and score such files. MM-Vet's own scorer takes
another file (`mm_vet_answers`).
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from perception_jax.errors import DataError, did_you_mean
from perception_jax.evals.predictions import Prediction
from perception_jax.evals.vqa.asking import write_lines

TASKS = {
    "mmbench": "mmbench_en_dev",
    "mm_vet": "mmvet",
    "vqav2": "vqav2_val",
    "gqa": "gqa",
    "vizwiz": "vizwiz_vqa_val",
    "seed": "seedbench",
    "science_qa": "scienceqa_img",
    "mme": "mme",
}
"""lmms-eval's names of the benchmarks that LLaVA-1.5 reports and that are not scored here."""


def samples(
    predictions: Sequence[Prediction], docs: Sequence[Mapping[str, Any]], targets: Sequence[Any]
) -> list[dict[str, Any]]:
    """The lines of a samples file.

    Args:
      docs: rows of the benchmark, in its order; entries whose name has "image" are left out.
      targets: right answers.
    """
    found = []
    for number, (one, doc, target) in enumerate(zip(predictions, docs, targets, strict=True)):
        saved = {key: value for key, value in doc.items() if "image" not in key}
        found.append(
            {
                "doc_id": number,
                "doc": saved,
                "target": str(target),
                "input": one.prompt,
                "resps": [[one.output]],
                "filtered_resps": [one.output],
                "doc_hash": _hash(json.dumps(saved, indent=2, ensure_ascii=False)),
                "prompt_hash": _hash(one.prompt),
                "target_hash": _hash(str(target)),
            }
        )
    return found


def write_samples(
    folder: str | os.PathLike[str],
    benchmark: str,
    lines: Sequence[Mapping[str, Any]],
    *,
    time: str,
) -> pathlib.Path:
    """Writes `<time>_samples_<task>.jsonl` for one of `TASKS`.

    Raises:
      DataError: another benchmark.
    """
    if benchmark not in TASKS:
        raise DataError(f"there is no benchmark {benchmark!r}{did_you_mean(benchmark, TASKS)}")
    name = f"{time.replace(':', '-')}_samples_{TASKS[benchmark]}.jsonl"
    return write_lines(pathlib.Path(folder) / name, lines)


def mm_vet_answers(predictions: Sequence[Prediction]) -> dict[str, str]:
    """The object that MM-Vet's scorer reads: the answers by "v1_<number>"."""
    return {f"v1_{one.id}": one.output for one in predictions}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
