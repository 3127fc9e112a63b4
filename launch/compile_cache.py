"""Keeps compiled programs on disk, so that the second start of a program is faster.

jax does the work; here it is switched on for the programs of this folder, by its own environment
variables. They are read when jax is imported, so this comes first and imports nothing heavy.

- `JAX_COMPILATION_CACHE_DIR` names the folder. Without it, it is one below `perception_jax/xla` in
  the user's cache directory (`$XDG_CACHE_HOME`, else `~/.cache`), and its size is limited.
- `JAX_ENABLE_COMPILATION_CACHE=0` switches it off.

A folder that cannot be used, or a damaged file in it, costs the time to compile and nothing else.
Programs of several CPU devices are always recompiled, see `skip_several_cpu_devices`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import tempfile
import warnings

MAX_BYTES = 2 * 1024**3
"""Size limit of the default folder; above it, least recently used files are removed to one half."""

_FOLDER = "JAX_COMPILATION_CACHE_DIR"
# jax keeps only what takes a second to compile; a start consists of many smaller programs.
_KEPT = ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
_COMPLAINTS = "Error (reading|writing) persistent compilation cache entry"


def enable() -> None:
    """Sets the defaults that jax reads at import; settings of the user are kept."""
    warnings.filterwarnings("ignore", _COMPLAINTS)
    if not os.environ.get(_FOLDER):
        folder = default_folder()
        if not _is_writable(folder):
            return
        _shrink(folder, MAX_BYTES)
        os.environ[_FOLDER] = str(folder)
    os.environ.setdefault(*_KEPT)


def skip_several_cpu_devices() -> None:
    """Makes jax compile what runs on several CPU devices instead of reading it from the cache.

    A program that jaxlib 0.10.2 reads back has lost the order of its collectives: devices start
    different ones, wait for each other, and XLA ends the process after 40 seconds. jax has no
    setting for it. Imports jax; call it before anything is compiled. Further calls do nothing.
    """
    from jax._src import compilation_cache

    read = compilation_cache.get_executable_and_time
    if getattr(read, "skips_several_cpu_devices", False):
        return

    @functools.wraps(read)
    def read_unless_several(cache_key, compile_options, backend, executable_devices):
        if backend.platform == "cpu" and len(executable_devices) > 1:
            return None, None
        return read(cache_key, compile_options, backend, executable_devices)

    read_unless_several.skips_several_cpu_devices = True
    compilation_cache.get_executable_and_time = read_unless_several


def default_folder() -> pathlib.Path:
    """Default folder of compiled programs."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return pathlib.Path(os.path.expanduser(base)) / "perception_jax" / "xla" / _machine()


def _machine() -> str:
    """Identifies the processor: machines may share a home, and programs may crash on other ones."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = {line for line in lines if line.lower().startswith(("model name", "flags", "features"))}
    text = "\n".join([platform.machine(), platform.processor(), *sorted(kinds)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _is_writable(folder: pathlib.Path) -> bool:
    """Makes the folder if need be. What is in it gets run, so it is the user's alone."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _shrink(folder: pathlib.Path, limit: int) -> None:
    found = []
    for file in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process may remove it meanwhile
            found.append((file.stat().st_atime, file.stat().st_size, file))
    size = sum(nbytes for _, nbytes, _ in found)
    if size <= limit:
        return
    for _, nbytes, file in sorted(found):
        if size <= limit // 2:
            return
        with contextlib.suppress(OSError):
            file.unlink()
        size -= nbytes
