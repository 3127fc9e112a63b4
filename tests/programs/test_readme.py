"""Every code block of the documents works: Python blocks run, commands name what exists.

A Python block stands alone; those of a page in docs/ run in one session, from top to bottom.
`<!-- skip-test: reason -->` on the line before a block leaves it out.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import itertools
import pathlib
import re
import shlex
import subprocess
import textwrap
from collections.abc import Iterator

import pytest

from launch import common
from tests.forking import Server

ROOT = pathlib.Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\s*$")
_SKIP = re.compile(r"<!-- skip-test: .+ -->")
_PLACEHOLDER = re.compile(r"[\[\]<>…|]|\.\.\.|\bX\b")
"""Marks a command that shows a form (`[:arg]`, `configs/X.py`), not one to type as it stands."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: where it starts, its language and its text, dedented."""

    path: str
    line: int
    language: str
    text: str
    skipped: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


def documents() -> list[pathlib.Path]:
    """The documents whose blocks must work."""
    patterns = (
        "*.md",
        "docs/**/*.md",
        "launch/**/*.md",
        "configs/**/*.md",
        "perception_jax/**/*.md",
    )
    return sorted({file for pattern in patterns for file in ROOT.glob(pattern)})


def blocks_of(text: str, path: str = "") -> Iterator[Block]:
    """All fenced blocks of a Markdown text."""
    before, opened, lines = "", None, []
    for number, line in enumerate(text.splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None:
            if fence:
                opened, lines = (number, fence["language"], bool(_SKIP.search(before))), []
            before = line or before
        elif fence and not fence["language"]:
            start, language, skipped = opened
            body = textwrap.dedent("\n".join(lines))
            yield Block(path, start, language, body, skipped)
            opened, before = None, ""
        else:
            lines.append(line)
    assert opened is None, f"{path}:{opened}: the block is never closed"


def blocks(*languages: str) -> list[Block]:
    return [
        block
        for file in documents()
        for block in blocks_of(file.read_text(), str(file.relative_to(ROOT)))
        if block.language in languages and not block.skipped
    ]


def commands_of(block: Block) -> Iterator[list[str]]:
    """The block's commands as words, without prompts, comments and variable assignments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def check_command(words: list[str]) -> None:
    """Fails if a `make` target, a program, a flag or a setting does not exist."""
    if words[0] == "make":
        check_make(words[1:])
    elif words[0] == "launch/cloud/tpu.sh":
        check_launcher(words)
    elif pathlib.Path(words[0]).name.startswith("python") and words[1:2] == ["-m"]:
        package, _, program = words[2].partition(".")
        if package == "launch":
            check_program(program, words[3:])
    elif words[0] == "docker" and "-f" in words:
        assert (ROOT / words[words.index("-f") + 1]).is_file()


def check_launcher(words: list[str]) -> None:
    """Runs `tpu.sh` dry, and checks the command that it would run on the slice."""
    done = subprocess.run(
        ["bash", ROOT / words[0], words[1], "--dry_run", *words[2:]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "gcloud compute tpus" in done.stdout
    check_remote(words)


def check_remote(words: list[str]) -> None:
    """Checks the words behind `--`, but for `env NAME=VALUE` in front."""
    if "--" in words:
        behind = words[words.index("--") + 1 :]
        if behind[0] == "env":
            behind = list(itertools.dropwhile(lambda word: "=" in word, behind[1:]))
        check_command(behind)


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in words:
        name, separator, value = word.partition("=")
        if not separator:
            assert name in targets, f"make {name}: targets are {sorted(targets)}"
        elif name == "ARGS" and "quickstart" in words:
            defaults = ["--config=configs/quickstart.py", "--workdir=w"]
            check_program("train", [*defaults, *shlex.split(value)])


def check_program(name: str, argv: list[str]) -> None:
    file = ROOT / "launch" / f"{name.replace('.', '/')}.py"
    assert file.exists(), f"there is no program launch.{name}"
    check_remote(argv)
    program = importlib.import_module(f"launch.{name}").PROGRAM
    shows_form = any(_PLACEHOLDER.search(word) for word in argv)
    if not shows_form and not {"--help", "-h"} & set(argv):
        common.parse(argv, program)


@pytest.fixture
def playground(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder that looks like the repository and can be written to without touching it."""
    for name in ("perception_jax", "launch", "configs", "docs", "README.md", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def sessions(found: list[Block]) -> dict[str, list[Block]]:
    """Blocks that run together, by a name for them."""
    together: dict[str, list[Block]] = {}
    for block in found:
        name = block.path if block.path.startswith("docs/") else str(block)
        together.setdefault(name, []).append(block)
    return together


def script(session: list[Block]) -> str:
    """The blocks as one script with the document's line numbers."""
    lines: list[str] = []
    for block in session:
        lines += [""] * (block.line - len(lines))
        lines += block.text.splitlines()
    return "\n".join(lines)


SESSIONS = sessions(blocks("python"))


@pytest.fixture(scope="module")
def scripts() -> Iterator[Server]:
    with Server(ROOT, "tests.programs.scripts") as server:
        yield server


@pytest.mark.parametrize("name", SESSIONS)
def test_python_blocks_run(name, playground, scripts):
    log = playground / "log"
    order = {"script": script(SESSIONS[name]), "folder": str(playground), "log": str(log)}
    assert scripts.start(order) == [0], f"{name}\n{log.read_text()}"


@pytest.mark.parametrize("wrong", ["jax.numpy", "exit(3)", "import os; os.abort()"])
def test_a_script_that_fails_is_noticed(wrong, playground, scripts):
    order = {"script": wrong, "folder": str(playground), "log": str(playground / "log")}
    assert scripts.start(order) != [0]


@pytest.mark.parametrize("block", blocks("bash", "sh", "shell", "console"), ids=str)
def test_commands_of_block_exist(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands_of(block):
        check_command(words)


def docstring_commands() -> list[tuple[str, str]]:
    """Commands that the docstrings of programs and config files show, with the file's name."""
    files = [file for folder in ("launch", "configs") for file in (ROOT / folder).rglob("*.py")]
    return [
        (str(file.relative_to(ROOT)), command.replace("\\\n", " "))
        for file in sorted(files)
        for command in re.findall(
            r"python -m launch\.(?:[^`\n\\]|\\\n)+",
            ast.get_docstring(ast.parse(file.read_text())) or "",
        )
    ]


@pytest.mark.parametrize(("file", "command"), docstring_commands())
def test_commands_of_docstrings_exist(file, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    if not _PLACEHOLDER.search(command):
        check_command(shlex.split(command))


def test_the_readme_shows_code_and_the_two_commands():
    readme = list(blocks_of((ROOT / "README.md").read_text()))
    commands = [words for b in readme if b.language == "bash" for words in commands_of(b)]
    assert [b for b in readme if b.language == "python" and not b.skipped]
    assert ["make", "quickstart"] in commands
    assert ["make", "test"] in commands


def test_a_page_of_docs_is_one_session_and_keeps_its_lines():
    text = "```python\na = 1\n```\n\n1. In a list:\n   ```python\n   b = a / 0\n   ```\n"
    page = list(blocks_of(text, "docs/page.md"))
    assert list(sessions(page)) == ["docs/page.md"]
    with pytest.raises(ZeroDivisionError) as error:
        exec(script(page), {})
    assert error.traceback[-1].lineno + 1 == 7
    assert list(sessions(list(blocks_of(text, "a.md")))) == ["a.md:1", "a.md:6"]


def test_blocks_are_found_and_skipped():
    text = textwrap.dedent(
        """
        <!-- skip-test: needs a TPU -->
        ```python
        skipped()
        ```
        1. In a list:
           ```bash
           $ A=1 python -m launch.train \\
               --workdir=w  # here
           make test
           ```
        ```
        not code
        ```
        """
    )
    found = list(blocks_of(text, "a.md"))
    assert [(b.line, b.language, b.skipped) for b in found] == [
        (3, "python", True),
        (7, "bash", False),
        (12, "", False),
    ]
    assert list(commands_of(found[1])) == [
        ["python", "-m", "launch.train", "--workdir=w"],
        ["make", "test"],
    ]


@pytest.mark.parametrize(
    "command",
    [
        "make quickstrt",
        "make quickstart ARGS=--wrkdir=x",
        "python -m launch.trian --help",
        ".venv/bin/python -m launch.train --config=configs/quickstart.py --workdir=w --no-such=1",
        "python -m launch.train --config=configs/quickstart.py --workdir=w --config.nothing=1",
        "launch/cloud/tpu.sh status --name=vit --zone=z",
        "docker build -f launch/Dockerfile .",
        "python -m launch.cloud.jobset --name=a --slice=v5e-4 --image=i --claim=c "
        "-- python -m launch.trian",
    ],
)
def test_wrong_commands_are_noticed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, common.UsageError)):
        check_command(shlex.split(command))
