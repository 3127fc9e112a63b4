"""A conversation with a language model, and its loop in a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from perception_jax.data.records import Turn
from perception_jax.errors import ConfigError
from perception_jax.generate import State
from perception_jax.systems.text.model import TextModel

HELP = "/reset starts anew, /exit ends (as Ctrl-D does), Ctrl-C stops an answer (twice: ends)."
"""Commands of `converse`."""


class Chat:
    """A conversation whose cache is kept from turn to turn.

    Each turn is tokenized as a part of the whole conversation, so that the model reads what it was
    trained on. What the cache already holds of these tokens is not computed again.

    Attributes:
      turns: so far, of user and assistant in turn.
      read: number of tokens that the last turn computed before its answer.
      ended: how the last answer ended, see `generate.Generated`; None if it was stopped, or before
        the first one.

    Args:
      model: to talk to.
      tokens: at most so many for each answer.
    """

    def __init__(self, model: TextModel, *, tokens: int):
        self._model, self._tokens = model, tokens
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation."""
        self.turns: tuple[Turn, ...] = ()
        self.read = 0
        self.ended: str | None = None
        self._ids: list[int] = []
        self._state: State | None = None

    def say(self, text: str) -> Iterator[str]:
        """Yields the answer in pieces, as it is generated.

        An answer of which the caller takes only the first pieces (and closes this iterator) stays
        in the conversation as far as it came; an empty one is left out with its question.

        Raises:
          ConfigError: no text, or a conversation that fills the model's context; it then stays as
            it was.
        """
        self.ended = None
        turns = (*self.turns, Turn(role="user", text=text))
        ids = self._model.ids(turns, where="conversation")
        self._state = self._appended(ids)
        self._ids = ids
        writing = self._model.write(self._state, tokens=self._tokens)
        try:
            yield from writing
            self._state, self._ids = writing.state, [*ids, *writing.ids]
            self.ended = writing.generated().ended
        finally:
            if writing.text:
                self.turns = (*turns, Turn(role="assistant", text=writing.text))

    def _appended(self, ids: Sequence[int]) -> State:
        """The state of tokens, from what the cache holds of them.

        At least the last token is new, for its logits.
        """
        generator = self._model.generator
        kept = _common(self._ids, ids[:-1])
        self.read = len(ids) - kept
        if self._state is None:
            return generator.prefill([ids], room=self._tokens).state
        seen = np.zeros(self._state.seen.shape, bool)
        seen[0, ids[:kept]] = True
        cache = self._state.cache.with_lengths(jnp.array([kept], jnp.int32))
        state = dataclasses.replace(self._state, cache=cache, seen=jnp.asarray(seen))
        return generator.extend(state, [ids[kept:]], room=self._tokens).state


def converse(chat: Chat, write: Callable[[str], None]) -> None:
    """Reads turns from standard input and writes the answers, until its end or "/exit".

    Args:
      write: writes a piece of text at once.
    """
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and history of `input`)
        write(HELP + "\n")
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            write("\n(/exit ends)\n")
            continue
        if line == "/exit":
            return
        if line == "/reset":
            chat.reset()
        elif line.startswith("/"):
            write(HELP + "\n")
        elif line:
            _answer(chat, line, write)


def _answer(chat: Chat, line: str, write: Callable[[str], None]) -> None:
    """Writes one answer; Ctrl-C ends it, and an error is one line."""
    try:
        with _interrupt() as requested, contextlib.closing(chat.say(line)) as pieces:
            for piece in pieces:
                write(piece)
                if requested():
                    write("\n(stopped)")
                    break
        write("\n(stopped at --tokens or at the end of the context)\n" * (chat.ended == "length"))
    except ConfigError as error:
        write(f"{error} /reset starts anew.")
    write("\n")


@contextlib.contextmanager
def _interrupt() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed; a second time it raises.

    Nothing is raised the first time, so that no computation is left running: one that still runs
    when the process exits crashes it. Handlers are a matter of the main thread.
    """
    pressed: list[int] = []

    def note(number: int, frame: types.FrameType | None) -> None:
        del frame
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens at which two texts begin alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(first), len(second)))
