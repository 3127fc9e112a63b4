"""The program of language models for `launch`: training (see `training`), the commands `text`,
`chat` and `vqa` of `launch.predict`, and plans of serving for `launch.plan`.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from perception_jax.systems.text.training import data, finish, load, report, shapes, task

if TYPE_CHECKING:
    import jax

    from perception_jax.data.processors import Mode
    from perception_jax.generate import Generated
    from perception_jax.shard.slices import Slice
    from perception_jax.systems.text.model import TextModel
    from perception_jax.systems.text.prompts import Prompt
    from perception_jax.systems.text.serving import ServingPlan
    from perception_jax.systems.text.vqa import ImageQuestion

__all__ = [
    "COMMANDS",
    "data",
    "finish",
    "load",
    "report",
    "serving_plans",
    "shapes",
    "task",
]

_ENDED = {"end": "an end token", "stop": "a stop string", "length": "--tokens or the context"}
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


def define_text_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `launch.predict text`."""
    _define_common_flags(values, tokens=128)
    flags.DEFINE_multi_string("prompt", None, "A prompt; any number.", flag_values=values)
    flags.DEFINE_string(
        "prompts",
        None,
        'A file of prompts: one a line, or .jsonl with "prompt" and, where wanted, "id".',
        flag_values=values,
    )
    flags.DEFINE_integer(
        "batch", 8, "Prompts at a time.", lower_bound=1, upper_bound=4096, flag_values=values
    )
    flags.DEFINE_string("out", None, "Folder of the results.", flag_values=values)
    flags.DEFINE_bool(
        "attention", False, "Draws the answers' attention over their prompts.", flag_values=values
    )
    flags.DEFINE_integer(
        "layer", -1, "Layer of --attention; negative counts from the end.", flag_values=values
    )
    flags.mark_flags_as_mutual_exclusive(("prompt", "prompts"), required=True, flag_values=values)
    flags.register_multi_flags_validator(
        ("attention", "prompt", "out"),
        lambda given: not given["attention"] or bool(given["prompt"] and given["out"]),
        message="--attention needs --prompt and --out.",
        flag_values=values,
    )


def define_chat_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `launch.predict chat`."""
    _define_common_flags(values, tokens=512)
    flags.DEFINE_multi_string(
        "image", [], "An image shown with the first question; any number.", flag_values=values
    )


def define_vqa_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `launch.predict vqa`."""
    _define_common_flags(values, tokens=128)
    flags.DEFINE_string("image", None, "An image, or a folder of them.", flag_values=values)
    flags.DEFINE_multi_string(
        "question", [], "A question about each image; any number.", flag_values=values
    )
    flags.DEFINE_string(
        "questions",
        None,
        'A .jsonl file of questions: "image" (a path from its folder), "question", if wanted "id".',
        flag_values=values,
    )
    flags.DEFINE_integer(
        "batch", 8, "Questions at a time.", lower_bound=1, upper_bound=4096, flag_values=values
    )
    flags.DEFINE_string("out", None, "Folder of the results.", required=True, flag_values=values)
    flags.DEFINE_integer(
        "layer",
        None,
        "Layer whose attention is drawn; negative counts from the end; by default the middle one.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "image_mode",
        None,
        ["hf_crop", "tv_crop", "squash", "llava_pad"],
        "How images become squares, instead of the model's way. MMVP's evaluation crops (hf_crop).",
        flag_values=values,
    )
    flags.mark_flags_as_mutual_exclusive(("image", "questions"), required=True, flag_values=values)
    flags.register_multi_flags_validator(
        ("image", "question"),
        lambda given: bool(given["image"]) == bool(given["question"]),
        message="--image needs --question, and --questions has images of its own.",
        flag_values=values,
    )


def text(values: flags.FlagValues) -> int:
    """Answers prompts."""
    from perception_jax.systems.text.prompts import Prompt, read_prompts

    if values.prompts is not None:
        return _answer_file(values, read_prompts(values.prompts))
    prompts = [
        Prompt(id=str(number), text=one, where="--prompt")
        for number, one in enumerate(values.prompt, 1)
    ]
    model = _open(values)
    ids = [model.prompt_ids(one.text, where=one.where) for one in prompts]
    if len(ids) == 1:
        answers = [_streamed(model, ids[0], values.tokens)]
    else:
        answers = []
        for start in range(0, len(ids), values.batch):
            batch = ids[start : start + values.batch]
            answers += model.answer(batch, tokens=values.tokens, first=start)
        for prompt, answer in zip(prompts, answers, strict=True):
            print(f"--- {prompt.text}\n{answer.text}")
    if values.out is not None:
        _save(values, model, prompts, ids, answers)
    return 0


def chat(values: flags.FlagValues) -> int:
    """Talks with a model in the terminal."""
    from perception_jax.data.conversation import AUTO
    from perception_jax.errors import ConfigError
    from perception_jax.systems.text.chat import Chat, converse
    from perception_jax.systems.text.model import NAMES

    model = _open(values)
    if values.image and not model.host:
        model.pixels(values.image)  # says what is wrong
    if values.template == AUTO and not model.host and model.tokenizer.chat_template is None:
        raise ConfigError(
            f"{values.model}: expected a chat template in the tokenizer's files, found none. Give "
            f"the one that the model was trained with as --template, of {', '.join(NAMES)}."
        )
    converse(Chat(model, tokens=values.tokens), _write, values.image)
    return 0


def vqa(values: flags.FlagValues) -> int:
    """Answers questions about images."""
    from perception_jax.inference.images import ImageRun
    from perception_jax.systems.text.vqa import Asker, read_questions

    if values.questions is not None:
        return _answer_questions(values, read_questions(values.questions))
    images = ImageRun.plan(pathlib.Path(values.image), pathlib.Path(values.out))
    model = _open(values, image_mode=values.image_mode)
    facts = _settings(values, model)
    asker = Asker(model, values.question, tokens=values.tokens, layer=values.layer, facts=facts)
    return images.run(asker)


COMMANDS = {
    "text": (define_text_flags, text),
    "chat": (define_chat_flags, chat),
    "vqa": (define_vqa_flags, vqa),
}
"""Flags and function of each command; see `launch.systems.HasCommands`."""


def _define_common_flags(values: flags.FlagValues, *, tokens: int) -> None:
    number = functools.partial(flags.DEFINE_float, default=None, flag_values=values)
    whole = functools.partial(flags.DEFINE_integer, flag_values=values)
    string = functools.partial(flags.DEFINE_string, default=None, flag_values=values)
    string("model", help="A checkpoint folder, a GGUF file, or a hub id.", required=True)
    whole("tokens", tokens, "At most so many tokens for each answer.", lower_bound=1)
    number("temperature", help="Divides the logits; 0 is greedy.", lower_bound=0.0)
    whole("top_k", None, "Draws from so many of the likeliest tokens.", lower_bound=1)
    number("top_p", help="Draws from the likeliest tokens of this probability.", upper_bound=1.0)
    number("repetition_penalty", help="Above 1: tokens of the text so far become less likely.")
    whole("seed", 0, "Of what is drawn.")
    flags.DEFINE_multi_string("stop", [], "A string that ends a text.", flag_values=values)
    string("system", help="The system text, instead of the template's.")
    string("template", default="auto", help="Conversation template; plain: the prompt as it is.")
    string("lora", help="A folder of PEFT with LoRA, which is merged.")
    flags.DEFINE_bool(
        "int8", False, "Kernels in int8: a quarter of the memory.", flag_values=values
    )
    string("dtype", help="Of the weights, e.g. bfloat16; by default as stored.")


def _open(values: flags.FlagValues, *, image_mode: Mode | None = None) -> TextModel:
    """The model with everything that the flags say about it.

    Args:
      image_mode: how images become squares; None keeps the model's way.
    """
    import dataclasses

    from perception_jax.api import prepare
    from perception_jax.models.hosts import Host
    from perception_jax.systems.text.model import (
        TextModel,
        choose_template,
        prepared,
        sampling_of,
        tokenizer_of,
    )

    opened = prepare(values.model)
    tokenizer = tokenizer_of(opened)
    # Before gigabytes are read.
    choose_template(values.template, tokenizer, images=isinstance(opened.model, Host))
    given = {name: getattr(values, name) for name in _SAMPLING}
    sampling = dataclasses.replace(
        sampling_of(opened), **{name: value for name, value in given.items() if value is not None}
    )
    loaded = prepared(opened, dtype=values.dtype, adapter=values.lora, quantized=values.int8)
    if image_mode is not None and loaded.processor.image is not None:
        loaded = loaded.at_size(loaded.processor.image.size, mode=image_mode)
    return TextModel(
        loaded,
        template=values.template,
        system=values.system,
        sampling=sampling,
        seed=values.seed,
        stop=values.stop,
    )


def _streamed(model: TextModel, ids: Sequence[int], tokens: int) -> Generated:
    """Answers one prompt, and writes the text as it is generated."""
    import time

    start = time.perf_counter()
    writing = model.write(model.generator.prefill([ids], room=tokens).state, tokens=tokens)
    for piece in writing:
        _write(piece)
    _write("\n")
    answer = writing.generated()
    seconds = time.perf_counter() - start
    print(
        f"({len(ids)} and {len(answer.ids)} tokens in {seconds:.1f} s, compilation included; "
        f"ended by {_ENDED[answer.ended]})",
        file=sys.stderr,
    )
    return answer


def _answer_file(values: flags.FlagValues, prompts: Sequence[Prompt]) -> int:
    """Answers the prompts of a file; with `--out` those that are not answered there yet."""
    model = _open(values)
    ids = [model.prompt_ids(one.text, where=one.where) for one in prompts]

    def answer(rows: Sequence[int]) -> list[Generated]:
        batch = [ids[row] for row in rows]
        return model.answer(batch, tokens=values.tokens, first=rows[0])

    items = [(one.id, one.text) for one in prompts]
    return _answer_items(values, model, items, answer, [one.text for one in prompts])


def _answer_questions(values: flags.FlagValues, questions: Sequence[ImageQuestion]) -> int:
    """Answers the questions of a file that are not answered in `--out` yet."""
    import numpy as np

    model = _open(values, image_mode=values.image_mode)
    ids = [model.prompt_ids(one.text, images=1, where=one.where) for one in questions]

    def answer(rows: Sequence[int]) -> list[Generated]:
        images = model.image_tokens(np.stack([model.pixels([questions[r].image]) for r in rows]))
        batch = [ids[row] for row in rows]
        return model.answer(batch, image_tokens=images, tokens=values.tokens, first=rows[0])

    items = [(one.id, one.text) for one in questions]
    asked = [(str(one.image), one.text) for one in questions]
    return _answer_items(values, model, items, answer, asked)


def _answer_items(
    values: flags.FlagValues,
    model: TextModel,
    items: Sequence[tuple[str, str]],
    answer: Callable[[Sequence[int]], list[Generated]],
    asked: Any,
) -> int:
    """Answers the rows of a file in batches of one size, and keeps the answers in `--out`.

    Args:
      items: id and text of each.
      answer: takes the numbers of some rows.
      asked: what the answers depend on besides the settings, as JSON values.
    """
    import hashlib
    import json

    import tqdm

    from perception_jax.evals import runner
    from perception_jax.evals.predictions import Prediction

    digest = hashlib.sha256(json.dumps([_settings(values, model), asked]).encode())
    model_id = f"{values.model}#{digest.hexdigest()[:16]}"

    def run(left: Sequence[int]) -> Any:
        hidden = not sys.stderr.isatty()
        with tqdm.tqdm(total=len(left), unit="prompt", dynamic_ncols=True, disable=hidden) as bar:
            for start in range(0, len(left), values.batch):
                rows = list(left[start : start + values.batch])
                missing = values.batch - len(rows) if start else 0  # keeps the compiled shapes
                answers = answer(rows + rows[:1] * missing)
                bar.update(len(rows))
                for row, one in zip(rows, answers, strict=False):
                    yield Prediction(
                        id=items[row][0],
                        prompt=items[row][1],
                        output=one.text,
                        model_id=model_id,
                        extras=_facts(one),
                    )

    if values.out is None:
        for one in run(range(len(items))):
            tqdm.tqdm.write(f"--- {one.prompt}\n{one.output}")
        return 0
    made = runner.predict([name for name, _ in items], run, values.out, model_id=model_id)
    print(f"{values.out}: {made} of {len(items)} prompts answered now, the others before")
    return 0


def _save(
    values: flags.FlagValues,
    model: TextModel,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    answers: Sequence[Generated],
) -> None:
    """Writes `text.json` and, if requested, `attention.html`."""
    import json

    from perception_jax.errors import PerceptionError
    from perception_jax.files import write_whole
    from perception_jax.systems.text.attention import attention_page, prompt_attention

    facts = [
        {"prompt": prompt.text, "prompt_ids": list(tokens), **_facts(answer), "text": answer.text}
        for prompt, tokens, answer in zip(prompts, ids, answers, strict=True)
    ]
    out = pathlib.Path(values.out)
    if values.attention:
        found = {
            prompt.text: prompt_attention(model, tokens, answer.ids, layer=values.layer)
            for prompt, tokens, answer in zip(prompts, ids, answers, strict=True)
        }
        for fact in facts:
            fact["attention"] = found[fact["prompt"]].to_json()
        page = attention_page(found, subtitle=values.model, layer=values.layer)
        page.write(out / "attention.html")
    content = {**_settings(values, model), "answers": facts}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "text.json", json.dumps(content, ensure_ascii=False) + "\n")
    except OSError as error:
        raise PerceptionError(
            f"cannot write the results to {out}: {error}. Check the folder's permissions and the "
            "free space."
        ) from error


def _settings(values: flags.FlagValues, model: TextModel) -> dict[str, Any]:
    """What the answers depend on besides the prompts, as JSON values."""
    import dataclasses

    return {
        "model": values.model,
        "lora": values.lora,
        "int8": values.int8,
        "dtype": values.dtype,
        "template": dataclasses.asdict(model.template),
        "image_mode": None if model.image is None else model.image.mode,
        "sampling": dataclasses.asdict(model.sampling),
        "seed": values.seed,
        "stop": [] if model.stop is None else list(model.stop.strings),
        "tokens": values.tokens,
    }


def _facts(answer: Generated) -> dict[str, Any]:
    return {
        "ids": list(answer.ids),
        "log_probs": list(answer.log_probs),
        "ended": answer.ended,
    }


def _write(piece: str) -> None:
    print(piece, end="", flush=True)


def serving_plans(config: Any, found: Slice, devices: Sequence[jax.Device]) -> list[ServingPlan]:
    """Plans of the prefill and of a step of the decode loop, from shapes alone."""
    from perception_jax.api.language import language_config
    from perception_jax.shard.mesh import MeshConfig
    from perception_jax.systems.text.serving import Serving, serving_plans

    settings = Serving(
        batch_size=config.batch_size,
        prompt=config.prompt,
        context=config.context,
        dtype=config.dtype,
        int8=config.int8,
        mesh=MeshConfig(**config.mesh.to_dict()),
    )
    return serving_plans(language_config(config.model), settings, found, devices)
