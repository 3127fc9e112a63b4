"""A language model that takes and gives text: tokenizer, conversation template, sampling; and
images, where it reads them.

Letters: T tokens, M images, I tokens of an image, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from perception_jax.api import Loaded, load_lora
from perception_jax.data.conversation import (
    AUTO,
    IMAGE_TEXT,
    TEMPLATES,
    Template,
    for_images,
    from_jinja,
    named,
    tokenize_images,
)
from perception_jax.data.inputs import as_images
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Turn
from perception_jax.data.tokenization import LanguageTokenizer, TextStream
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.generate import (
    Generated,
    Generator,
    LanguageModel,
    Sampling,
    State,
    StopStrings,
    reason_ended,
)
from perception_jax.generate.sampling import FILE
from perception_jax.models.hosts import Host
from perception_jax.models.llava import LlavaConfig
from perception_jax.nn import int8, lora, stack
from perception_jax.ops.image import normalise
from perception_jax.settings import parse_json

PLAIN = "plain"
"""Name of the template that leaves a prompt as it is."""
NAMES = tuple(name for name, template in TEMPLATES.items() if not template.opening)
"""Names of the templates for conversations without images."""
STREAMED = 4
"""Steps of the decode loop between two pieces of streamed text."""


class TextModel:
    """A language model with its tokenizer, template and sampling, ready to generate.

    Attributes:
      generator: of the model.
      tokenizer: of the checkpoint.
      template: of prompts and conversations; its system text is the one in use.
      sampling: with the tokens that end a text, the template's among them.
      stop: strings that end a text; None without any.
      seed: of what is drawn.
      host: the model where it reads images, else None.
      image: its image processor.

    Args:
      loaded: a language model with its tokenizer and weights. On CPU the model cannot be used
        otherwise afterwards (`nn.stack.separate`).
      template: one of `NAMES`, or `AUTO`.
      system: the system text; None is the template's.
      sampling: None is that of the checkpoint's `generation_config.json`, else greedy.
      seed: of what is drawn.
      stop: strings that end a text, in addition to the template's.
      chunk: steps of the decode loop between two looks of the host; see `generate.Generator`.

    Raises:
      CheckpointError: the checkpoint has no tokenizer of a language model.
      ConfigError: another kind of model, or an unknown template.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        template: str = AUTO,
        system: str | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        chunk: int = STREAMED,
    ):
        self.tokenizer = tokenizer_of(loaded)
        images = isinstance(loaded.model, Host)
        self.template = choose_template(template, self.tokenizer, images=images)
        if system is not None:
            self.template = self.template.with_system(system)
        end = self.template.after_assistant.strip()
        end_id = self.tokenizer.token_id(end) if end else None
        sampling = sampling_of(loaded) if sampling is None else sampling
        ends = sampling.end_ids if end_id is None else (*sampling.end_ids, end_id)
        self.sampling = dataclasses.replace(sampling, end_ids=tuple(dict.fromkeys(ends)))
        strings = (*stop, end) if end and end_id is None else tuple(stop)
        decode = self.tokenizer.decode
        self.stop = StopStrings(strings=strings, decode=decode) if strings else None
        self.seed = seed
        on_cpu = jax.default_backend() == "cpu"
        model = stack.separate(loaded.model) if on_cpu else loaded.model
        self.generator = Generator(model, chunk=chunk)
        self.host: Host | None = model if isinstance(model, Host) else None
        self.image: ImageProcessor | None = loaded.processor.image
        self._config = loaded.config

    @property
    def context(self) -> int:
        """Most tokens of a text."""
        return self.generator.model.context

    def ids(self, turns: Sequence[Turn], *, where: str = "prompt") -> list[int]:
        """The tokens of a conversation up to where the model's answer begins.

        Args:
          turns: for a model with images with `IMAGE_TEXT` for each of them.
          where: what to call the conversation in an error.

        Raises:
          ConfigError: no text, or one that leaves no room for an answer.
        """
        if not turns[-1].text.strip():
            raise ConfigError(f"{where}: expected text, found an empty one.")
        text = self.template.prompt(turns, answer=True)
        ids = self.tokenizer(text).tolist() if self.host is None else self._with_images(text)
        if len(ids) >= self.context:
            raise ConfigError(
                f"{where}: expected fewer tokens than the model's context has, {self.context}, "
                f"found {len(ids)}: shorten the text."
            )
        return ids

    def prompt_ids(self, text: str, *, images: int = 0, where: str = "prompt") -> list[int]:
        """The tokens of a single prompt in the template.

        Args:
          images: that it is about; they come before the text.
          where: as of `ids`.

        Raises:
          ConfigError: as of `ids`.
        """
        if not text.strip():
            raise ConfigError(f"{where}: expected text, found an empty one.")
        return self.ids([self.turn(text, images)], where=where)

    def turn(self, text: str, images: int = 0) -> Turn:
        """A turn of the user with images before its text."""
        marks = isinstance(self._config, LlavaConfig) and self._config.image_marks
        around = ("<im_start>", "<im_end>") if marks else ("", "")
        image = IMAGE_TEXT.join(around)
        return Turn(role="user", text=f"{image * images}\n{text}" if images else text)

    def pixels(self, images: Sequence[Any]) -> np.ndarray:
        """Reads images as the uint8 pixels that the model takes, uint8[M, H, W, 3].

        Raises:
          ConfigError: the model takes no images.
          ImageError: an image cannot be decoded.
        """
        if self.host is None or self.image is None:
            raise ConfigError(
                f"expected a model that reads images, e.g. a LLaVA, found a "
                f"{type(self.generator.model).__name__}."
            )
        return np.stack([self.image.read(image).pixels for image in as_images(list(images))])

    def image_tokens(self, pixels: np.ndarray) -> Float[Array, "B M I D"]:
        """Encodes uint8[B, M, H, W, 3] pixels of images as tokens of the language model."""
        images = normalise(jnp.asarray(pixels), self.image.mean, self.image.std)
        return _encode(self.host, images)

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        image_tokens: Float[Array, "B M I D"] | None = None,
        tokens: int,
        first: int = 0,
    ) -> list[Generated]:
        """Generates a text for each prompt, as one batch.

        Args:
          prompts: from `prompt_ids`.
          image_tokens: of the images of each prompt.
          tokens: at most so many for each.
          first: number of the first prompt in a longer list; see `Generator.generate`.
        """
        answers = self.generator.generate(
            prompts,
            image_tokens=image_tokens,
            tokens=tokens,
            sampling=self.sampling,
            seed=self.seed,
            stop=self.stop,
            first=first,
        )
        return [
            dataclasses.replace(one, text=self.tokenizer.decode(one.ids))
            if one.text is None
            else one
            for one in answers
        ]

    def _with_images(self, text: str) -> list[int]:
        counts = [self.host.tokens_per_image] * text.count(IMAGE_TEXT)
        image_id = self._config.image_id if isinstance(self._config, LlavaConfig) else None
        return tokenize_images(self.tokenizer, text, counts, image_id=image_id).tolist()

    def write(self, state: State, *, tokens: int) -> Writing:
        """Starts to write the answer to a prompt that has been read (`generator.prefill`)."""
        return Writing(self, state, tokens)


@jax.jit
def _encode(host: Host, images: Any) -> Any:
    return host.image_tokens(images)


class Writing:
    """An answer that is being written; iterating over it gives its text in pieces.

    Attributes:
      ids, log_probs: of the tokens so far.
      text: as it was given so far.
      state: with all tokens, once the answer has ended; None before.
    """

    def __init__(self, model: TextModel, state: State, tokens: int):
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self.text = ""
        self.state: State | None = None
        self._model = model
        self._parts = model.generator.stream(
            state, tokens=tokens, sampling=model.sampling, seed=model.seed, stop=model.stop
        )

    def __iter__(self) -> Iterator[str]:
        stop = self._model.stop
        shown = _Shown(self._model.tokenizer.stream(), () if stop is None else stop.strings)
        for part in self._parts:
            self.ids += part.ids[0]
            self.log_probs += part.log_probs[0]
            self.state = part.state
            yield self._given(shown.push(part.ids[0]))
        yield self._given(shown.close())

    def generated(self) -> Generated:
        """The answer, once it has ended."""
        return Generated(
            ids=tuple(self.ids),
            log_probs=tuple(self.log_probs),
            ended=reason_ended(self.ids, self._model.sampling.end_ids, self._model.stop),
            text=self.text,
        )

    def _given(self, piece: str) -> str:
        self.text += piece
        return piece


class _Shown:
    """The text of tokens as they come: whole characters, nothing that a stop string may become."""

    def __init__(self, stream: TextStream, stop: Sequence[str]):
        self._stream, self._stop = stream, stop
        self._text, self._given = "", 0

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain by now and was not returned before."""
        self._text += self._stream.push(ids)
        held = max((_overlap(self._text, string) for string in self._stop), default=0)
        return self._until(len(self._text) - held)

    def close(self) -> str:
        """The rest."""
        self._text += self._stream.close()
        return self._until(len(self._text))

    def _until(self, end: int) -> str:
        found = (self._text.find(string) for string in self._stop)
        end = min([end, *(place for place in found if place >= 0)])
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of a text with which a string begins, without the whole string."""
    sizes = range(min(len(text), len(string) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(string[:size])), 0)


def prepared(
    opened: Loaded,
    *,
    dtype: Any = None,
    adapter: str | None = None,
    quantized: bool = False,
) -> Loaded:
    """Reads the weights of a model for inference.

    Args:
      opened: without weights; see `api.prepare`.
      dtype: of the floating leaves; see `api.load`.
      adapter: folder with LoRA of PEFT, which is merged.
      quantized: whether kernels become int8, each as soon as it is read; with an adapter only after
        all are merged.

    Raises:
      CheckpointError, ConfigError: as of `api.load` and `api.load_lora`.
    """
    if adapter is None:
        return opened.load_weights(dtype=dtype, int8=quantized)
    loaded = load_lora(opened.load_weights(dtype=dtype), adapter)
    model = lora.merge_lora(loaded.model)
    return dataclasses.replace(loaded, model=int8.quantize_linear(model) if quantized else model)


def tokenizer_of(loaded: Loaded) -> LanguageTokenizer:
    """The tokenizer of a language model.

    Raises:
      ConfigError: another kind of model.
      CheckpointError: the checkpoint has none.
    """
    if not isinstance(loaded.model, LanguageModel):
        raise ConfigError(
            f"{loaded.name}: expected a language model, e.g. of the Llama family, found a "
            f"{type(loaded.model).__name__}."
        )
    if not isinstance(loaded.processor.tokenizer, LanguageTokenizer):
        raise CheckpointError(
            f"{loaded.name}: expected a tokenizer (tokenizer.json or tokenizer.model, or inside "
            "a GGUF file), found none that is supported. Put the files next to the weights."
        )
    return loaded.processor.tokenizer


def sampling_of(loaded: Loaded) -> Sampling:
    """The sampling of a checkpoint's `generation_config.json`; without one greedy, up to the end
    tokens of the tokenizer or the model.

    Raises:
      ConfigError: settings that are not supported.
    """
    tokenizer = tokenizer_of(loaded)
    sampling = Sampling()
    if FILE in tokenizer.files:
        where = f"{loaded.name}: {FILE}"
        sampling = Sampling.from_hf(parse_json(tokenizer.files[FILE], where), where)
    if sampling.end_ids:
        return sampling
    try:
        ends = tokenizer.end_ids
    except CheckpointError:  # the tokenizer names none
        ends = tuple(loaded.config.end_ids)
    return dataclasses.replace(sampling, end_ids=ends)


def choose_template(name: str, tokenizer: LanguageTokenizer, *, images: bool = False) -> Template:
    """The template of a name; for `AUTO` that of the tokenizer's chat template, or `PLAIN`.

    For a model that reads images see `data.conversation.for_images`.

    Raises:
      ConfigError: an unknown name, or `AUTO` with a chat template that is not known here.
    """
    if images:
        return for_images(name, tokenizer.chat_template, NAMES)
    if name == AUTO:
        if tokenizer.chat_template is None:
            return TEMPLATES[PLAIN]
        found = from_jinja(tokenizer.chat_template)
        if found is None:
            raise ConfigError(
                "template: the checkpoint has a chat template, but none that is known here. Give "
                f"one of {', '.join(NAMES)} as the template; {PLAIN} leaves prompts as they are."
            )
        return found
    return named(name, NAMES)
