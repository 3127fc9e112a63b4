"""What all programs share: the command line, `--help`, and how errors are shown.

    python -m launch.NAME --config=FILE.py[:ARG] [--config.KEY=VALUE …] [--flag=value …]

`FILE.py` defines `get_config(arg=None) -> ConfigDict` and, for programs that train or evaluate,
`get_task(config, loaded=None) -> perception_jax.train.task.Task`. `ARG` is for values that change
several settings at once; single settings are `--config.KEY=VALUE`. A later flag replaces an earlier
one, `--config` included; overrides always apply to the config that remains.

A program is a module with a `PROGRAM` and a `run(parsed)`; it imports what is heavy inside `run`,
so that `--help` answers at once:

    if __name__ == "__main__":
        sys.exit(common.main(PROGRAM, run))
"""

from __future__ import annotations

import dataclasses
import errno
import os
import pathlib
import sys
import textwrap
import threading
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn

import ml_collections

from launch import compile_cache, config_files, overrides
from launch.config_files import load_config_module
from launch.overrides import UsageError
from perception_jax.errors import ConfigError, PerceptionError

__all__ = [
    "Argument",
    "Flag",
    "Parsed",
    "Program",
    "UsageError",
    "format_help",
    "leave",
    "load_config_module",
    "main",
    "parse",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Flag:
    """A flag of one program, `--name=value`.

    Attributes:
      name: without the dashes.
      type: bool (also bare `--name`), int, float, str or pathlib.Path.
      default: the value when the flag is absent; not converted.
      help: one sentence.
      required: absent is a usage error.
      choices: the only texts allowed, if any.
      repeated: each further one adds to the value, a tuple, instead of replacing it; texts are
        taken as they stand.
    """

    name: str
    type: type = str
    default: Any = None
    help: str = ""
    required: bool = False
    choices: tuple[str, ...] = ()
    repeated: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Argument:
    """A positional argument; optional ones (None when absent) come last."""

    name: str
    help: str = ""
    required: bool = True
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a program's command line looks like.

    Attributes:
      name: of the module in `launch`, e.g. "train".
      description: one or a few sentences for `--help`.
      flags, positional: its own; `--config`, `--traceback` and `--help` come with `common`.
      config: whether `--config` must, may or cannot be given.
      examples: whole commands.
    """

    name: str
    description: str
    flags: tuple[Flag, ...] = ()
    positional: tuple[Argument, ...] = ()
    config: Literal["required", "optional", "none"] = "required"
    examples: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A command line, understood.

    Attributes:
      config: resolved (argument and overrides applied) and locked; None without `--config`.
      module: the imported config file (`module.get_task(config)`); None without `--config`.
      flags: value by name; every flag of the program has an entry.
      positional: text by name.
      config_path, config_arg: the two halves of `--config`.
    """

    config: ml_collections.ConfigDict | None
    module: types.ModuleType | None
    flags: Mapping[str, Any]
    positional: Mapping[str, str | None]
    config_path: pathlib.Path | None
    config_arg: str | None


_TRACEBACK = Flag("traceback", bool, False, "Shows where in the code an error arose.")
_HELP = ("--help", "-h")
_LEAVE_SECONDS = 15.0
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WIDTH = 96
"""Columns of `--help`."""


def parse(argv: Sequence[str], program: Program) -> Parsed:
    """Understands a command line (without the program's own name) or says what is wrong with it.

    Raises:
      ConfigError: an unknown flag or key (named with the nearest ones), a value of the wrong type,
        something required that is missing, or a config file that cannot be used.
    """
    words = _sort_words(argv, program)
    flags = _flag_values(words.flags, program)
    positional = _positional_values(words.positional, program)
    config = module = path = arg = None
    if words.config is not None:
        path, arg = config_files.split_spec(words.config)
        module = load_config_module(path)
        config = config_files.build_config(module, arg, path)
        overrides.apply(config, words.overrides)
        config.lock()
    elif words.overrides:
        raise UsageError(
            f"--config.{words.overrides[0][0]} overrides a config, but no --config=FILE is given."
        )
    elif program.config == "required":
        raise UsageError("--config=FILE is missing, e.g. --config=configs/quickstart.py.")
    return Parsed(
        config=config,
        module=module,
        flags=types.MappingProxyType(flags),
        positional=types.MappingProxyType(positional),
        config_path=path,
        config_arg=arg,
    )


def main(
    program: Program, run: Callable[[Parsed], int | None], argv: Sequence[str] | None = None
) -> int:
    """Parses, runs, and turns errors of ours into one clear message.

    Args:
      argv: None takes the process's own, and keeps compiled programs (see `compile_cache`).

    Returns:
      The exit code: what `run` returns (None is 0); 1 after a `PerceptionError`; 2 for a command
      line that cannot be understood; 130 after Ctrl-C.
    """
    if argv is None:
        argv = sys.argv[1:]
        compile_cache.switch_on()
    argv = list(argv)
    if any(word in _HELP for word in argv):
        print(format_help(program, _config_named_in(argv, program)))
        return 0
    show_traceback = "--traceback" in argv
    try:
        parsed = parse(argv, program)
    except ConfigError as error:
        if show_traceback:
            traceback.print_exc()
        print(f"{_command(program)}: {error}\nSee {_command(program)} --help", file=sys.stderr)
        return 2
    try:
        return run(parsed) or 0
    except PerceptionError as error:
        if parsed.flags["traceback"]:
            traceback.print_exc()
        print(f"{_command(program)}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{_command(program)}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if parsed.flags["traceback"] or error.errno not in _DISK_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"{_command(program)}: {error.strerror}{where}. Free disk space.", file=sys.stderr)
        return 1


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code, also where a thread still waits for a file.

    Python waits for all threads, and one that reads a named pipe or a dead network disk never ends.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):  # the terminal or the pipe is gone; Python would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    last = threading.Timer(_LEAVE_SECONDS, os._exit, [code])
    last.daemon = True
    last.start()
    sys.exit(code)


@dataclasses.dataclass(slots=True)
class _Words:
    """The words of a command line by kind, not yet checked against types."""

    config: str | None = None
    overrides: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    flags: dict[str, list[str | None]] = dataclasses.field(default_factory=dict)
    positional: list[str] = dataclasses.field(default_factory=list)


def _sort_words(argv: Sequence[str], program: Program) -> _Words:
    known = {flag.name: flag for flag in (*program.flags, _TRACEBACK)}
    words, rest = _Words(), list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.positional.append(word)
            continue
        name, separator, text = word[2:].partition("=")
        value = text if separator else None
        takes_next = name == "config" or (name in known and known[name].type is not bool)
        if value is None and takes_next and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        if name.startswith("config.") and program.config != "none":
            words.overrides.append((name.removeprefix("config."), value))
        elif name == "config" and program.config != "none":
            if not value:
                raise UsageError("--config needs a file: write --config=FILE.py[:ARG].")
            words.config = value
        elif name in known:
            words.flags.setdefault(name, []).append(value)
        else:
            raise UsageError(
                f"--{name}: there is no such flag."
                + overrides.did_you_mean(name, _flag_names(program))
            )
    return words


def _flag_names(program: Program) -> list[str]:
    config = [] if program.config == "none" else ["config"]
    return [*config, *(flag.name for flag in program.flags), _TRACEBACK.name, "help"]


def _flag_values(texts: Mapping[str, list[str | None]], program: Program) -> dict[str, Any]:
    values = {}
    for flag in (*program.flags, _TRACEBACK):
        if flag.name in texts:
            given = texts[flag.name]
            values[flag.name] = (
                tuple(_flag_value(flag, text) for text in given)
                if flag.repeated
                else _flag_value(flag, given[-1])
            )
        elif flag.required:
            raise UsageError(f"--{flag.name} is missing. {flag.help}".rstrip())
        else:
            values[flag.name] = flag.default
    return values


def _flag_value(flag: Flag, text: str | None) -> Any:
    where = f"--{flag.name}"
    if flag.choices and text is not None:
        _check_choice(where, text, flag.choices)
    if flag.repeated and flag.type is str and text is not None:
        return text
    is_path = flag.type is pathlib.Path
    kind = str if is_path else flag.type
    value = overrides.parse_value(text, flag.default, kind=kind, where=where)
    return pathlib.Path(value) if is_path else value


def _check_choice(where: str, text: str, choices: tuple[str, ...]) -> None:
    if text not in choices:
        near = overrides.nearest(text, choices, count=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"{where}: expected one of {', '.join(choices)}, found {text!r}.{hint}")


def _positional_values(texts: Sequence[str], program: Program) -> dict[str, str | None]:
    values: dict[str, str | None] = {}
    for argument, text in zip(program.positional, texts, strict=False):
        if argument.choices:
            _check_choice(argument.name, text, argument.choices)
        values[argument.name] = text
    for argument in program.positional[len(texts) :]:
        if argument.required:
            raise UsageError(f"{argument.name} is missing. {argument.help}".rstrip())
        values[argument.name] = None
    extra = texts[len(program.positional) :]
    if extra:
        raise UsageError(f"unexpected argument {extra[0]!r}; settings are --NAME=VALUE.")
    return values


def format_help(program: Program, config: ml_collections.ConfigDict | None = None) -> str:
    """The text of `--help`; with a config, its settings and their values too."""
    required = [f"--{f.name}={_metavar(f)}" for f in program.flags if f.required]
    names = [a.name if a.required else f"[{a.name}]" for a in program.positional]
    config_word = {"required": ["--config=FILE[:ARG]"], "optional": ["[--config=FILE[:ARG]]"]}
    usage = [_command(program), *names, *config_word.get(program.config, []), *required, "[flags]"]
    rows = [(a.name, a.help) for a in program.positional]
    if program.config != "none":
        rows += [
            ("--config=FILE[:ARG]", "A config file; ARG sets several values at once."),
            ("--config.KEY=VALUE", "Overrides one setting of the config."),
        ]
    rows += [(_flag_usage(flag), _flag_help(flag)) for flag in (*program.flags, _TRACEBACK)]
    rows += [("--help", "Shows this; with --config=FILE, its settings too.")]
    description = textwrap.fill(program.description, _WIDTH)
    sections = [f"usage: {' '.join(usage)}", description, _table(rows)]
    if program.examples:
        sections.append("examples:\n" + "\n".join(f"  {line}" for line in program.examples))
    if config is not None:
        settings = [(f"--config.{key}", repr(value)) for key, value in overrides.leaves(config)]
        sections.append("settings of the config:\n" + _table(settings))
    return "\n\n".join(sections)


def _config_named_in(argv: Sequence[str], program: Program) -> ml_collections.ConfigDict | None:
    specs = [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    if not specs or program.config == "none":
        return None
    path, arg = config_files.split_spec(specs[-1])
    try:
        return config_files.build_config(load_config_module(path), arg, path)
    except ConfigError:  # help must come even if the config is what one needs help with
        return None


def _command(program: Program) -> str:
    return f"python -m launch.{program.name}"


def _metavar(flag: Flag) -> str:
    if flag.choices:
        return "|".join(flag.choices)
    return {int: "N", float: "X", pathlib.Path: "PATH"}.get(flag.type, "VALUE")


def _flag_usage(flag: Flag) -> str:
    if flag.type is bool:
        return f"--{flag.name}"
    return f"--{flag.name}={_metavar(flag)}{' …' if flag.repeated else ''}"


def _flag_help(flag: Flag) -> str:
    if flag.required:
        return f"{flag.help} (required)"
    if flag.default in (None, False, "", ()):
        return flag.help
    return f"{flag.help} (default: {flag.default})"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = min(max((len(left) for left, _ in rows), default=0), 36)
    indent = " " * (width + 4)
    lines = []
    for left, right in rows:
        text = f"  {left:<{width}}  {right}".rstrip()
        lines.append(
            textwrap.fill(text, _WIDTH, subsequent_indent=indent, break_long_words=False)
            if len(text) > _WIDTH
            else text
        )
    return "\n".join(lines)
