"""One table of several GiVE runs: a row for each recipe, mean and spread over its seeds.

python tests/bench/give_table.py runs/full_s0 runs/full_s1 runs/no_oid_s0 ...

Reads `results.json` of each work directory. Folders that differ in a last `_sN` alone are seeds of
one recipe; the spread is their standard deviation. The first row is the backbone without an
instruction.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import statistics
import sys

COLUMNS = {
    "AUC, overlooked": ("oid_auc_overlooked", "static_auc_overlooked"),
    "AUC, all": ("oid_auc_all", "static_auc_all"),
    "L-mAP, overlooked": ("l_map_presence_overlooked", "l_map_static_overlooked"),
    "L-mAP, all": ("l_map_presence_all", "l_map_static_all"),
    "same-class R@1": ("same_class_r1_conditioned", "same_class_r1_static"),
    "P acc@1": ("p_acc1_conditioned", None),
    "P acc@1, blank image": ("p_acc1_copy_floor", None),
}
"""Title, and the number's name with and without an instruction."""
SEED = re.compile(r"_s\d+$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    recipes: dict[str, list[dict[str, float]]] = {}
    for folder in parser.parse_args().runs:
        recipes.setdefault(SEED.sub("", folder.name), []).append(numbers_of(folder))
    print("\n".join(table(recipes)))


def numbers_of(folder: pathlib.Path) -> dict[str, float]:
    """The main numbers of a run by name, without that of its evaluator."""
    path = folder / "results.json"
    if not path.is_file():
        sys.exit(f"{path}: no such file; expected the work directory of a finished run")
    found = json.loads(path.read_text())
    return {key.split("/", 1)[1]: value for key, value in found.items() if "/" in key}


def table(recipes: dict[str, list[dict[str, float]]]) -> list[str]:
    """Lines of Markdown."""
    every = [run for runs in recipes.values() for run in runs]
    lines = ["| | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    lines.append(row("static", every, [plain for _, plain in COLUMNS.values()]))
    for name, runs in recipes.items():
        lines.append(row(name, runs, [told for told, _ in COLUMNS.values()]))
    return lines


def row(title: str, runs: list[dict[str, float]], keys: list[str | None]) -> str:
    """Every number as "mean ± spread"."""
    cells = [cell([run[key] for run in runs if key in run], key) if key else "" for key in keys]
    return f"| {title} | " + " | ".join(cells) + " |"


def cell(values: list[float], key: str) -> str:
    """AUC with three decimals, percentages with one."""
    if not values:
        return ""
    digits = 3 if "auc" in key else 1
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
