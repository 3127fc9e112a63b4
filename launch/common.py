"""Common parts of all programs: absl flags, `--config`, and errors as one line.

    python -m launch.NAME --config=FILE.py[:ARG] [--config.KEY=VALUE …] [--flag=value …]

A program is a module with a `PROGRAM` and a `run(parsed)`. Its docstring is what `--help` shows.
It imports what is heavy inside `run`, so that `--help` answers at once:

    if __name__ == "__main__":
        common.start(PROGRAM, run)
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import os
import pathlib
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from launch import compile_cache
from perception_jax.errors import ConfigError, PerceptionError, did_you_mean

_EXIT_SECONDS = 15.0
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


Define = Callable[[flags.FlagValues], None]
"""Function that defines flags."""


class UsageError(ConfigError):
    """An invalid command line (exit code 2)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The command line of a program.

    Attributes:
      name: of the module in `launch`, e.g. "train".
      define: defines the program's flags in the `FlagValues` that it is given; or several such
        functions by command, for a program whose first argument is a command.
      config: whether the program takes `--config`, which is then required.
      positional: names of the arguments without dashes, all required.
      rest: whether words behind `--` are taken as they are, e.g. a command.
    """

    name: str
    define: Define | Mapping[str, Define]
    config: bool = False
    positional: tuple[str, ...] = ()
    rest: bool = False

    @property
    def command(self) -> str:
        """The command that starts the program."""
        return f"python -m launch.{self.name}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parsed:
    """A checked command line.

    Attributes:
      flags: value by name, e.g. `parsed.flags.workdir`.
      command: the first argument of a program with commands.
      positional: text by name.
      rest: the words behind `--`.
      config: with overrides applied, locked; None for a program without `--config`.
      defaults: the config without overrides.
      config_path: the file of `--config`, without its argument.
    """

    flags: flags.FlagValues
    positional: Mapping[str, str]
    rest: tuple[str, ...] = ()
    command: str | None = None
    config: ml_collections.ConfigDict | None = None
    defaults: ml_collections.ConfigDict | None = None
    config_path: pathlib.Path | None = None


def parse(argv: Sequence[str], program: Program, values: flags.FlagValues | None = None) -> Parsed:
    """Parses a command line (without the program's own name).

    Args:
      values: where flags are defined; by default none that another call sees.

    Raises:
      UsageError: an unknown flag or setting (named with the nearest one), a value of the wrong
        type, something required that is missing.
      ConfigError: a config file that cannot be used.
    """
    values = flags.FlagValues() if values is None else values
    argv, behind = _split_rest(argv, program)
    command, define, argv = _split_command(argv, program)
    argv = [program.command, *argv]
    defaults = path = None
    spec = _config_spec(argv) if program.config else None
    if spec is not None:
        defaults, path = load_config(spec)
        _check_overrides(argv, defaults)
    others = set(values)
    define(values)
    _define_common_flags(values, argv if program.config else None)
    for name in set(values) - others:  # so that --help shows them, wherever they are defined
        values.register_key_flag_for_module(sys.argv[0], values[name])
    try:
        rest = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        known = sorted(name for name in values if "." not in name)
        hint = did_you_mean(error.flagname, known, prefix="--")
        raise UsageError(f"--{error.flagname}: there is no such flag{hint}") from error
    except flags.Error as error:
        raise UsageError(str(error)) from error
    if program.config:
        _check_elements(defaults, values.config)
    if len(rest) < len(program.positional):
        raise UsageError(f"{program.positional[len(rest)]} is missing.")
    if len(rest) > len(program.positional):
        surplus = rest[len(program.positional)]
        raise UsageError(f"unexpected argument {surplus!r}; settings are --NAME=VALUE.")
    return Parsed(
        flags=values,
        positional=dict(zip(program.positional, rest, strict=True)),
        rest=behind,
        command=command,
        config=values.config if program.config else None,
        defaults=defaults,
        config_path=path,
    )


def load_config(spec: str) -> tuple[ml_collections.ConfigDict, pathlib.Path]:
    """Calls `get_config` of `FILE.py[:ARG]`; gives the config and the file's path.

    Raises:
      ConfigError: the file is missing, is not Python, cannot be imported, or its `get_config` does
        not give a ConfigDict.
    """
    path = pathlib.Path(spec.partition(".py:")[0].removesuffix(".py") + ".py")
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.py") if not p.name.startswith("_"))
        found = f" That folder has: {', '.join(near[:8])}." if near else ""
        raise ConfigError(f"config file {path} does not exist in {pathlib.Path.cwd()}.{found}")
    sys.modules.pop("config_config", None)  # config_flags would run this file in another's names
    values = flags.FlagValues()
    words = [path.name, f"--config={spec}"]
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=words)
    try:
        values(words)
        return _config_dict(values.config, path), path
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}:{error.lineno}: {error.msg}.") from error
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be used as a config file: {error}.") from error


def leaves(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    """The dotted key of every setting, in alphabetical order."""
    found = []
    for key, value in config.items():
        inside = isinstance(value, ml_collections.ConfigDict)
        found += leaves(value, f"{prefix}{key}.") if inside else [f"{prefix}{key}"]
    return found


def _config_dict(config: Any, path: pathlib.Path) -> ml_collections.ConfigDict:
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"{path}: expected a function get_config(arg=None) that returns an "
            f"ml_collections.ConfigDict, found {type(config).__name__}."
        )
    return config


def _define_common_flags(values: flags.FlagValues, config_argv: Sequence[str] | None) -> None:
    """Defines `--traceback`, and `--config` for a program that is given the words it reads."""
    flags.DEFINE_bool("traceback", False, "Shows where an error arose.", flag_values=values)
    if config_argv is None:
        return
    config_flags.DEFINE_config_file(
        "config",
        None,
        "A config file, FILE.py[:ARG]; --config.KEY=VALUE overrides one of its settings.",
        flag_values=values,
        sys_argv=list(config_argv),
    )
    flags.mark_flag_as_required("config", values)


def _split_rest(argv: Sequence[str], program: Program) -> tuple[Sequence[str], tuple[str, ...]]:
    """The words before the first `--`, and those behind it, for a program that takes them."""
    if not program.rest or "--" not in argv:
        return argv, ()
    place = list(argv).index("--")
    return argv[:place], tuple(argv[place + 1 :])


def _split_command(
    argv: Sequence[str], program: Program
) -> tuple[str | None, Define, Sequence[str]]:
    """The command, what defines its flags, and the other words."""
    if not isinstance(program.define, Mapping):
        return None, program.define, argv
    if argv and argv[0] in program.define:
        return argv[0], program.define[argv[0]], argv[1:]
    if any(word.startswith(("--help", "-h")) for word in argv):
        return None, lambda values: None, argv
    found = f", found {argv[0]!r}" if argv else ""
    raise UsageError(f"expected a command first, one of {', '.join(program.define)}{found}.")


def _config_spec(argv: Sequence[str]) -> str | None:
    """The value of the last `--config`."""
    spec = None
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word.startswith("--config="):
            spec = word.removeprefix("--config=")
        elif word == "--config":
            spec = following
    return spec or None


def _check_overrides(argv: Sequence[str], config: ml_collections.ConfigDict) -> None:
    """Refuses `--config.KEY` of a key that the config lacks, naming the nearest one."""
    for word in argv:
        override = re.match(r"--?(?:no)?config\.([^=]+)", word)
        if override is None:
            continue
        key = override[1]
        keys = leaves(config)
        inside = [known for known in keys if known.startswith(f"{key}.")]
        if inside:
            raise UsageError(
                f"--config.{key} is a group of settings; set one of them: "
                f"{', '.join(f'--config.{known}' for known in inside)}."
            )
        if key not in keys:
            hint = did_you_mean(key, keys, prefix="--config.")
            raise UsageError(f"--config.{key}: the config has no such setting{hint}")


def _check_elements(defaults: ml_collections.ConfigDict, config: ml_collections.ConfigDict) -> None:
    """Refuses tuples whose elements are of another type than those of the config file.

    `config_flags` checks the type of every setting, but of a tuple not that of its elements.
    """
    for key in leaves(defaults):
        before, now = (functools.reduce(getattr, key.split("."), c) for c in (defaults, config))
        kinds = {type(item) for item in before} if isinstance(before, tuple) else set()
        wider = {int} if float in kinds else set()
        wrong = [item for item in now if type(item) not in kinds | wider] if kinds else []
        if wrong:
            names = " or ".join(sorted(kind.__name__ for kind in kinds))
            raise UsageError(
                f"--config.{key}: expected elements of type {names}, found {wrong[0]!r} "
                f"({type(wrong[0]).__name__})"
            )


def main(program: Program, run: Callable[[Parsed], int | None], argv: Sequence[str]) -> int:
    """Parses and runs in this process, and turns errors of the library into one clear line.

    Returns:
      The exit code: what `run` returns (None is 0); 1 after a `PerceptionError`; 2 for a command
      line that cannot be understood; 130 after Ctrl-C.
    """
    try:
        parsed = parse(argv, program)
    except ConfigError as error:
        return _report_usage(program, error)
    return _run(program, run, parsed)


def start(program: Program, run: Callable[[Parsed], int | None]) -> NoReturn:
    """Runs the program of this process on its command line, and ends the process."""
    compile_cache.enable()
    parsed: list[Parsed] = []

    def parse_all(argv: list[str]) -> list[str]:
        try:
            parsed.append(parse(argv[1:], program, flags.FLAGS))
        except ConfigError as error:
            sys.exit(_report_usage(program, error))
        return argv

    def run_quietly(_: list[str]) -> NoReturn:
        for name in ("absl", "jax"):  # absl's handler would show what jax logs for itself
            logging.getLogger(name).setLevel(logging.WARNING)
        exit_process(_run(program, run, parsed[0]))

    app.run(run_quietly, flags_parser=parse_all)


def exit_process(code: int) -> NoReturn:
    """Ends the process with an exit code, also where a thread still waits for a file.

    Python waits for all threads, and one that reads a named pipe or a dead network disk never ends.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):  # the terminal or the pipe is gone; Python would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    last = threading.Timer(_EXIT_SECONDS, os._exit, [code])
    last.daemon = True
    last.start()
    sys.exit(code)


def _run(program: Program, run: Callable[[Parsed], int | None], parsed: Parsed) -> int:
    show = parsed.flags.traceback
    try:
        return run(parsed) or 0
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except (PerceptionError, OSError) as error:
        message, code = _message(error), 1
        if message is None or show:
            traceback.print_exc()
    print(f"{program.command}: {message or 'failed, see above'}", file=sys.stderr)
    return code


def _message(error: PerceptionError | OSError) -> str | None:
    """Returns one line for errors of the library and for a full disk; None for others."""
    if isinstance(error, PerceptionError):
        return f"{type(error).__name__}: {error}"
    if error.errno in _DISK_ERRORS:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}. Free disk space."
    return None


def _report_usage(program: Program, error: ConfigError) -> int:
    print(f"{program.command}: {error}\nSee {program.command} --help", file=sys.stderr)
    return 2
