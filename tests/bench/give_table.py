"""One table of several GiVE runs: a row for each recipe, mean and spread over its seeds.

python tests/bench/give_table.py runs/full_s0 runs/full_s1 runs/no_oid_s0 ...

Reads `results.json` of each work directory. Folders that differ in a last `_sN` alone are seeds of
one recipe; the spread is their standard deviation. The first row is the backbone without an
instruction; with `--floors`, a row after each recipe has what a blank image reaches.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import statistics
import sys

COLUMNS = {
    "AUC, overlooked": "{}_auc_overlooked",
    "AUC, all": "{}_auc_all",
    "L-mAP, overlooked": "l_map_{}_overlooked",
    "L-mAP, all": "l_map_{}_all",
    "same-class R@1": "same_class_r1_{}",
    "P acc@1": "p_acc1_{}",
}
SYSTEMS = {
    "steered": ("oid", "presence", "conditioned"),
    "static": ("static",),
    "blank": ("blank", "copy_floor"),
}
"""What each of them is called in the names of numbers."""
SEED = re.compile(r"_s\d+$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument("--floors", action="store_true")
    given = parser.parse_args()
    recipes: dict[str, list[dict[str, float]]] = {}
    for folder in given.runs:
        recipes.setdefault(SEED.sub("", folder.name), []).append(numbers_of(folder))
    print("\n".join(table(recipes, floors=given.floors)))


def numbers_of(folder: pathlib.Path) -> dict[str, float]:
    """The main numbers of a run by name, without that of its evaluator."""
    path = folder / "results.json"
    if not path.is_file():
        sys.exit(f"{path}: no such file; expected the work directory of a finished run")
    found = json.loads(path.read_text())
    return {key.split("/", 1)[1]: value for key, value in found.items() if "/" in key}


def table(recipes: dict[str, list[dict[str, float]]], *, floors: bool) -> list[str]:
    """Lines of Markdown."""
    every = [run for runs in recipes.values() for run in runs]
    lines = ["| | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    lines.append(row("static", every, "static"))
    for name, runs in recipes.items():
        lines.append(row(name, runs, "steered"))
        if floors:
            lines.append(row(f"{name}, blank image", runs, "blank"))
    return lines


def row(title: str, runs: list[dict[str, float]], system: str) -> str:
    """Every number as "mean ± spread"; those that a run lacks are left empty."""
    keys = [[key.format(name) for name in SYSTEMS[system]] for key in COLUMNS.values()]
    cells = [
        cell([run[key] for run in runs for key in names if key in run], names[0]) for names in keys
    ]
    return f"| {title} | " + " | ".join(cells) + " |"


def cell(values: list[float], key: str) -> str:
    """AUC with three decimals, the others as percentages with one."""
    if not values:
        return ""
    digits = 3 if "auc" in key else 1
    if digits == 1:
        values = [100 * value for value in values]
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
