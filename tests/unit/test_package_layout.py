"""Rules of the package layout: imports, file sizes, safety, licences, a light install."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement

import perception_jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "perception_jax"
PRODUCT = ("perception_jax", "launch", "configs")
HEAVY = frozenset({"torch", "torchvision", "tensorflow", "transformers", "timm"})


def product_files(*folders: str) -> list[pathlib.Path]:
    return sorted(file for folder in folders or PRODUCT for file in (ROOT / folder).rglob("*.py"))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


# --- Packages -----------------------------------------------------------------------------------


FOR_ALL = {"errors", "files", "lazy", "settings", "version"}
"""Modules that every package may import."""


def readme_table() -> dict[str, set[str]]:
    """Package → what it may import, from the table in perception_jax/README.md."""
    text = (LIBRARY / "README.md").read_text()
    rows: dict[str, set[str]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != 3 or not cells[0].startswith("`"):
            continue
        above = set(rows) - FOR_ALL
        imports = set(re.findall(r"`([\w.]+)`", cells[2]))
        if cells[2].startswith("all of the above"):
            imports |= above
        for package in re.findall(r"`([\w.]+)`", cells[0]):
            rows[package.removesuffix(".py")] = imports
    return rows


def contracts() -> list[dict]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return project["tool"]["importlinter"]["contracts"]


def ours(modules: list[str]) -> list[str]:
    """Names below `perception_jax`, without that prefix."""
    prefix = "perception_jax."
    return [name.removeprefix(prefix) for name in modules if name.startswith(prefix)]


def test_import_contracts_are_the_readme_table():
    table = readme_table()
    packages = set(table) - FOR_ALL
    found, parts = {}, {}
    for contract in contracts():
        sources = contract["source_modules"] if contract["type"] == "forbidden" else []
        for package in ours(sources):
            found[package] = set(ours(contract["forbidden_modules"]))
            allowed = [line.split(" -> ")[1] for line in contract.get("ignore_imports", ())]
            parts[package] = set(ours(allowed))
    for package, imports in table.items():
        parts_of_packages = {name for name in imports if "." in name}
        assert found[package] == packages - (imports - parts_of_packages) - {package}, package
        assert parts[package] == parts_of_packages, package
    assert set(found) == set(table)


def test_every_module_belongs_to_a_package():
    packages = set(readme_table())
    here = {path.stem for path in LIBRARY.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert here - {"__init__", "__pycache__", "README", "weights"} <= packages


VIOLATIONS = {
    "ops/bad.py": "from perception_jax.nn import attention",
    "models/bad.py": "def late():\n    from perception_jax.interop import export",
    "train/bad.py": "import perception_jax.systems.give",
    "systems/groma/bad.py": "from perception_jax.systems.give import task",
    "data/bad.py": "from launch import common",
    "viz/bad.py": "import torch",
}


def test_a_forbidden_import_breaks_the_contracts(tmp_path):
    """Empty packages pass; one wrong import per contract kind is found, late ones included."""
    modules = [f"{package}/__init__.py" for package in readme_table()]
    modules += ["nn/attention.py", "interop/export.py", "interop/rules.py", "systems/give/task.py"]
    modules += ["__init__.py", "systems/give/__init__.py", "systems/groma/__init__.py"]
    files = [tmp_path / "perception_jax" / name for name in modules]
    files += [tmp_path / "launch/__init__.py", tmp_path / "launch/common.py"]
    files += [tmp_path / "configs/__init__.py", tmp_path / "perception_jax/models/good.py"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    files[-1].write_text("from perception_jax.interop.rules import Rule\n")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert "0 broken" in lint_imports(tmp_path)
    for name, line in VIOLATIONS.items():
        (tmp_path / "perception_jax" / name).write_text(f"{line}\n")
    report = lint_imports(tmp_path)
    assert f"{len(VIOLATIONS)} broken" in report
    for name in VIOLATIONS:
        assert f"perception_jax.{name.removesuffix('.py').replace('/', '.')} -> " in report


def lint_imports(folder: pathlib.Path) -> str:
    command = [pathlib.Path(sys.executable).parent / "lint-imports", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120).stdout


METHODS = ("GiVE", "Groma", "MQ-Det", "MoF", "ViCroP")
"""Names of methods that are systems, here or planned. (MMVP is also a benchmark, which data may
name.)"""


def names_of_systems(text: str) -> list[str]:
    """Where a text names a system: its module or folder, or the method."""
    systems = "|".join(sorted(path.name for path in (LIBRARY / "systems").iterdir()))
    pattern = rf"\bsystems[./](?:{systems})\b|\b(?:{'|'.join(METHODS)})\b"
    return re.findall(pattern, text)


def test_packages_below_the_systems_name_none():
    above = {"systems", "testing", "weights"}
    files = [path for path in LIBRARY.rglob("*") if path.suffix in (".py", ".md")]
    inside = [path for path in files if path.relative_to(LIBRARY).parts[0] not in above]
    lower = [path for path in inside if path.name != "README.md" or path.parent != LIBRARY]
    assert {path.relative_to(LIBRARY).parts[0] for path in lower} > {"nn", "models", "data", "api"}
    found = {
        str(path.relative_to(ROOT)): names
        for path in lower
        if (names := names_of_systems(path.read_text()))
    }
    assert found == {}
    assert names_of_systems("see perception_jax.systems.give.task, as GiVE does") == [
        "systems.give",
        "GiVE",
    ]
    assert names_of_systems("what they give, with a motion of Gromacs") == []


# --- Files --------------------------------------------------------------------------------------


def test_files_stay_short():
    lengths = {file: len(file.read_text().splitlines()) for file in product_files()}
    assert {str(f.relative_to(ROOT)): n for f, n in lengths.items() if n > 500} == {}


def test_every_module_and_public_name_of_the_library_has_a_docstring():
    bare = []
    for file in product_files("perception_jax", "launch"):
        tree = ast.parse(file.read_text())
        if tree.body and not ast.get_docstring(tree):
            bare.append(f"{file.relative_to(ROOT)}")
        definitions = (n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef))
        bare += [
            f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
            for node in definitions
            if not node.name.startswith("_") and not ast.get_docstring(node)
        ]
    assert bare == []


def imported_names(nodes: list[ast.stmt]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def test_nothing_is_evaluated_or_unpickled_by_name():
    found = []
    for file in product_files():
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id in ("eval", "exec", "compile"):
                found.append(f"{file.relative_to(ROOT)}:{node.lineno} {called.id}")
            for name in imported_names([node]):
                if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "marshal", "shelve"):
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno} {name}")
    assert found == []


def is_stub(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """True if all that a function does is to pass or to say that it is not written."""
    body = [n for n in function.body if not (isinstance(n, ast.Expr) and is_text(n.value))]
    return bool(body) and all(
        isinstance(n, ast.Pass) or (isinstance(n, ast.Raise) and "NotImplemented" in ast.dump(n))
        for n in body
    )


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_nothing_is_left_open():
    words = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = []
    for file in product_files():
        text, name = file.read_text(), file.relative_to(ROOT)
        lines = enumerate(text.splitlines(), 1)
        found += [f"{name}:{number} {line.strip()}" for number, line in lines if words.search(line)]
        kinds = ast.FunctionDef | ast.AsyncFunctionDef
        functions = (n for n in ast.walk(ast.parse(text)) if isinstance(n, kinds))
        found += [f"{name}:{f.lineno} {f.name} is a stub" for f in functions if is_stub(f)]
    assert found == []


# --- Licences and version -----------------------------------------------------------------------


def test_licence_and_notices_name_what_we_carry():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    notice = (ROOT / "NOTICE").read_text()
    for source, terms in {
        "googlefonts/noto-emoji": "Apache License, Version 2.0",
        "Noto Emoji v1": "Apache License, Version 2.0",
        "microsoft/fluentui-emoji": "MIT License",
        "jdecked/twemoji": "CC-BY-4.0",
        "openai/CLIP": "MIT License",
        "facebookresearch/detectron2": "Apache License, Version 2.0",
    }.items():
        assert source in notice
        assert terms in notice


def test_the_version_is_stated_once():
    version = perception_jax.__version__
    assert importlib.metadata.version("perception_jax") == version
    quoted = re.compile(rf"""["']{re.escape(version)}["']""")
    files = [*product_files(), ROOT / "pyproject.toml"]
    places = [str(f.relative_to(ROOT)) for f in files if quoted.search(f.read_text())]
    assert places == ["perception_jax/version.py"]


# --- A light install ----------------------------------------------------------------------------


def requirements_closure(name: str, extras: set[str]) -> set[str]:
    """Names of all installed distributions that `name[extras]` asks for, directly or not."""
    todo, seen = [(name, frozenset(extras))], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        distribution, wanted = current
        try:
            lines = importlib.metadata.requires(distribution) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in lines:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in wanted or {""}):
                todo.append((requirement.name, frozenset(requirement.extras)))
    return {distribution.lower() for distribution, _ in seen}


@pytest.mark.parametrize("extras", [set(), {"test"}, {"hub", "eval"}], ids=["base", "test", "use"])
def test_installs_without_torch_and_tensorflow(extras):
    needed = requirements_closure("perception_jax", extras)
    assert "jax" in needed
    assert needed & HEAVY == set()
    assert ("pytest" in needed) == ("test" in extras)


def test_extras_are_the_promised_ones():
    provided = importlib.metadata.metadata("perception_jax").get_all("Provides-Extra")
    expected = {"tpu", "cuda", "gguf", "hub", "eval", "tensorboard", "test", "parity", "docs"}
    assert set(provided) == expected


def test_works_where_torch_and_tensorflow_cannot_be_imported():
    blocked = ", ".join(f"{name}=None" for name in sorted(HEAVY))
    done = run_python(
        f"import sys; sys.modules.update({blocked})\nimport perception_jax, tensorflow_datasets"
    )
    assert done.returncode == 0, done.stderr


def test_import_is_light():
    """Clocks would measure the machine; a second of imports is one of these packages."""
    done = run_python("import perception_jax, sys; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert (
        set(names) & {"jax", "numpy", "flax", "PIL", "ml_collections", "typing_extensions"} == set()
    )
    assert len(names) < 300


def test_packages_are_light():
    """Importing every package without using it loads nothing that takes seconds."""
    packages = sorted(p.parent.name for p in LIBRARY.glob("*/__init__.py"))
    lines = [f"import perception_jax.{package}" for package in packages]
    done = run_python("\n".join([*lines, "import sys", "print(*sys.modules)"]))
    assert done.returncode == 0, done.stderr
    slow = {"tensorflow_datasets", "orbax", "grain", "transformers", "pyarrow", "tensorboardX"}
    slow |= {"matplotlib"}
    assert {name.split(".")[0] for name in done.stdout.split()} & (HEAVY | slow) == set()


def test_listed_names_exist_and_are_no_modules_by_accident():
    """A public name must not be hidden by a module of the same name once that is imported."""
    wrong = []
    for file in sorted(LIBRARY.rglob("__init__.py")):
        package = ".".join(file.parent.relative_to(ROOT).parts)
        module = importlib.import_module(package)
        inside = {path.stem for path in file.parent.iterdir()}
        for name in getattr(module, "__all__", ()):
            found = getattr(module, name, None)
            if found is None or (name in inside and not isinstance(found, types.ModuleType)):
                wrong.append(f"{package}.{name}")
    assert wrong == []
    with pytest.raises(AttributeError, match=r"'perception_jax\.nn' has no attribute 'Linera'"):
        perception_jax.nn.Linera  # noqa: B018
