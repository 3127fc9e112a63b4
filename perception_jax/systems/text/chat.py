"""A conversation with a language model, and its loop in a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from perception_jax.data.records import Turn
from perception_jax.errors import ConfigError, ImageError
from perception_jax.generate import IMAGE, State
from perception_jax.systems.text.model import TextModel

HELP = "/reset starts anew, /exit ends (as Ctrl-D does), Ctrl-C stops an answer (twice: ends)."
"""Commands of `converse`."""
IMAGE_HELP = "/image FILE shows an image with the next question."
"""The further command for a model that reads images."""


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

    @property
    def reads_images(self) -> bool:
        """Whether turns may have images."""
        return self._model.host is not None

    def reset(self) -> None:
        """Forgets the conversation."""
        self._pixels: tuple[np.ndarray, ...] = ()
        self.turns: tuple[Turn, ...] = ()
        self.read = 0
        self.ended: str | None = None
        self._ids: list[int] = []
        self._state: State | None = None

    def say(self, text: str, images: Sequence[Any] = ()) -> Iterator[str]:
        """Yields the answer in pieces, as it is generated.

        Args:
          text: what the user says.
          images: that come before it, as of `TextModel.pixels`.

        An answer of which the caller takes only the first pieces (and closes this iterator) stays
        in the conversation as far as it came; an empty one is left out with its question.

        Raises:
          ConfigError: no text, a conversation that fills the model's context, or images for a model
            that reads none; the conversation then stays as it was.
          ImageError: an image cannot be decoded.
        """
        self.ended = None
        if not text.strip():
            raise ConfigError("conversation: expected text, found an empty one.")
        turns = (*self.turns, self._model.turn(text, len(images)))
        pixels = (*self._pixels, *(self._model.pixels(images) if images else ()))
        ids = self._model.ids(turns, where="conversation")
        self._state = self._appended(ids, pixels)
        self._ids = ids
        writing = self._model.write(self._state, tokens=self._tokens)
        try:
            yield from writing
            self._state, self._ids = writing.state, [*ids, *writing.ids]
            self.ended = writing.generated().ended
        finally:
            if writing.text:
                self._pixels = pixels
                self.turns = (*turns, Turn(role="assistant", text=writing.text))

    def _appended(self, ids: Sequence[int], pixels: Sequence[np.ndarray]) -> State:
        """The state of tokens, from what the cache holds of them.

        At least the last token is new, for its logits. The new images are the last ones.
        """
        generator = self._model.generator
        kept = _common(self._ids, ids[:-1])
        self.read = len(ids) - kept
        new = 0
        if self._model.host is not None:
            new = ids[kept:].count(IMAGE) // self._model.host.tokens_per_image
        images = None
        if new:
            images = self._model.image_tokens(np.stack(pixels[len(pixels) - new :])[None])
        if self._state is None:
            return generator.prefill([ids], image_tokens=images, room=self._tokens).state
        seen = np.zeros(self._state.seen.shape, bool)
        seen[0, [token for token in ids[:kept] if token >= 0]] = True
        cache = self._state.cache.with_lengths(jnp.array([kept], jnp.int32))
        state = dataclasses.replace(self._state, cache=cache, seen=jnp.asarray(seen))
        more = [ids[kept:]]
        return generator.extend(state, more, image_tokens=images, room=self._tokens).state


def converse(chat: Chat, write: Callable[[str], None], images: Sequence[str] = ()) -> None:
    """Reads turns from standard input and writes the answers, until its end or "/exit".

    Args:
      write: writes a piece of text at once.
      images: files of images for the first turn.
    """
    shown = list(images)
    usage = f"{HELP}\n" + f"{IMAGE_HELP}\n" * chat.reads_images
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and history of `input`)
        write(usage)
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
        elif chat.reads_images and line.startswith("/image "):
            shown.append(line.removeprefix("/image ").strip())
        elif line.startswith("/"):
            write(usage)
        elif line:
            _answer(chat, line, shown, write)
            shown = []


def _answer(chat: Chat, line: str, images: Sequence[str], write: Callable[[str], None]) -> None:
    """Writes one answer; Ctrl-C ends it, and an error is one line."""
    try:
        answer = chat.say(line, images)
        with _interrupt() as requested, contextlib.closing(answer) as pieces:
            for piece in pieces:
                write(piece)
                if requested():
                    write("\n(stopped)")
                    break
        write("\n(stopped at --tokens or at the end of the context)\n" * (chat.ended == "length"))
    except ImageError as error:
        write(f"{error} The question was not asked.")
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
