"""The commands of MMVP for `launch.predict`: blind pairs, MMVP-VLM, questions and scores of VQA.

Heavy modules are imported in the functions that use them, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:
    from jax.sharding import Mesh

_SCENES, _CANVAS = "scenes", 96
_DAY = 86_400.0
_PROTOCOLS = ("mmvp", "pope", "textvqa", "llava_bench_coco", "llava_bench_in_the_wild")
_EXPORTED = ("mmbench", "mm_vet", "vqav2", "gqa", "vizwiz", "seed", "science_qa", "mme")


def define_blind_pairs_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `launch.predict blind_pairs`."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    whole = functools.partial(flags.DEFINE_integer, flag_values=values)
    encoder = "an encoder's name, NAME=SOURCE, a checkpoint, or FILE.npy or FILE.parquet[:COLUMN]."
    string("first", "openai-l14", f"What finds the pairs similar: {encoder}")
    string("second", "dinov2-l14", f"What finds them different: {encoder}")
    string(
        "images", None, "Folder of images, those in folders below it included; scenes: drawings."
    )
    string("out", None, "Folder of the results.", required=True)
    for name, default, words in (
        ("above", 0.95, "Cosines of the first encoder are greater."),
        ("below", 0.6, "Cosines of the second encoder are smaller."),
    ):
        flags.DEFINE_float(
            name, default, words, lower_bound=-1.0, upper_bound=1.0, flag_values=values
        )
    whole("batch", 64, "Images of a call.", lower_bound=1)
    whole("columns", 2048, "Columns of the similarity matrix at a time.", lower_bound=1)
    whole("sheet", 50, "Pairs on the contact sheet.", lower_bound=0)
    string(
        "share",
        None,
        "Index and number of the processes that share OUT, as 3/16; by default those of the job.",
    )


def define_vlm_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `launch.predict mmvp_vlm`."""
    flags.DEFINE_multi_string(
        "model",
        None,
        "An encoder's name, NAME=SOURCE, or a checkpoint; any number. By default all of the "
        "paper's table.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "data", None, "Folder of MMVP-VLM; scenes: drawings.", required=True, flag_values=values
    )
    flags.DEFINE_string("out", None, "Folder of the results.", required=True, flag_values=values)


def define_questions_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `launch.predict vqa_questions`."""
    string = functools.partial(flags.DEFINE_string, default=None, flag_values=values)
    flags.DEFINE_enum(
        "protocol", None, _PROTOCOLS, "The benchmark.", required=True, flag_values=values
    )
    string("data", help="Folder of the benchmark.", required=True)
    string("images", help="Folder of the images (all but mmvp).")
    flags.DEFINE_bool("ocr", False, "textvqa: with the words of the OCR file.", flag_values=values)
    string("out", help="The .jsonl file of questions.", required=True)


def define_score_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `launch.predict vqa_score`."""
    string = functools.partial(flags.DEFINE_string, default=None, flag_values=values)
    flags.DEFINE_enum(
        "protocol", None, _PROTOCOLS, "The benchmark.", required=True, flag_values=values
    )
    string("data", help="Folder of the benchmark.", required=True)
    string("answers", help="Folder of predictions, or a file of answers.", required=True)
    string("out", help="Folder of the results.", required=True)
    string("replies", help="Replies of a judge to OUT/requests.jsonl.")
    string("patterns", help="mmvp: a JSON list with the pattern of each pair.")
    flags.DEFINE_bool("corrected", False, "mmvp: the corrected labels.", flag_values=values)


def define_export_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `launch.predict vqa_export`."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    flags.DEFINE_enum(
        "benchmark", None, _EXPORTED, "The benchmark.", required=True, flag_values=values
    )
    string("data", None, "A .jsonl file with the benchmark's rows in its order.", required=True)
    string("answers", None, "Folder of predictions.", required=True)
    string("out", None, "Folder of the results.", required=True)
    string("id", "question_id", "Field of a row after which its prediction is named.")
    string("target", "answer", "Field of a row with the right answer.")


def blind_pairs(values: flags.FlagValues) -> int:
    """Finds blind pairs; returns 0 also where other processes have not finished."""
    from perception_jax.systems.mmvp import blind_pairs as work
    from perception_jax.systems.mmvp.mining import Thresholds

    share, wait = _processes(values.share)
    out, mesh = _folder(values.out), _mesh()
    settings = work.SearchSettings(
        first=values.first,
        second=values.second,
        images=_mined_images(values.images, out),
        thresholds=Thresholds(above=values.above, below=values.below),
        columns=values.columns,
        batch=values.batch,
        share=share,
        wait=wait,
    )
    images = work.embedded(settings, out, mesh)
    pairs = None if images is None else work.search(images, settings, out, mesh)
    if images is None or pairs is None:
        print(f"{out}: this process's share is done; the last one to finish writes the pairs")
        return 0
    if wait is not None and share[0]:
        return 0  # the first process writes
    path = work.write_pairs(out, images, pairs)
    print(
        f"{path}: {len(pairs)} blind of {pairs.similar} similar pairs of {len(images.names)} "
        f"images, {images.skipped} could not be read"
    )
    if hint := work.hint(pairs, settings.thresholds):
        print(hint)
    sheet = work.write_sheet(out, images, pairs, settings, most=values.sheet)
    if sheet is not None:
        print(f"{sheet}: contact sheet")
    return 0


def mmvp_vlm(values: flags.FlagValues) -> int:
    """Scores encoders on MMVP-VLM, and prints their table beside the paper's."""
    import jax

    from perception_jax.evals.vqa import mmvp_vlm as protocol
    from perception_jax.models.params import flatten
    from perception_jax.systems.mmvp.encoders import PAPER, encoder_of, open_encoder
    from perception_jax.systems.mmvp.tables import VlmResult, vlm_table
    from perception_jax.systems.mmvp.vlm import VlmRun

    out, mesh = _folder(values.out), _mesh()
    pairs, found = protocol.read_pairs(_vlm_data(values.data, out)), {}
    for name in values.model or PAPER:
        loaded = open_encoder(name, mesh)
        folder = _folder(out / name.replace("/", "--"))
        scores = VlmRun(loaded, pairs, mesh)(folder / "predictions")
        found[name] = VlmResult(
            scores=scores,
            row=encoder_of(name).row,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(flatten(loaded.model))),
            pixels=loaded.processor.image.size,
        )
        _write(folder / "output.csv", scores.output_csv())
        del loaded  # the next encoder may need the memory
    print(vlm_table(found))
    _write_json(out / "results.json", {name: one.scores.to_dict() for name, one in found.items()})
    return 0


def vqa_questions(values: flags.FlagValues) -> int:
    """Writes the questions of a benchmark for `launch.predict vqa`, and prints how to ask them."""
    from perception_jax.systems.mmvp import scoring

    images = None if values.images is None else pathlib.Path(values.images)
    data, path = pathlib.Path(values.data), pathlib.Path(values.out)
    questions, ways = scoring.questions_of(values.protocol, data, images, ocr=values.ocr)
    scoring.write_questions(path, questions)
    print(f"{path}: {len(questions)} questions. Ask a model with")
    for name, way in ways.items():
        words = [f"--template={way.template}", f"--tokens={way.max_tokens}"]
        words.append(f"--temperature={way.temperature:g}")
        words += [f"--top_k={way.top_k}"] if way.top_k else []
        words += [f"--image_mode={way.image_mode}"] if way.image_mode else []
        command = f"python -m launch.predict vqa --model=MODEL --questions={path} --out=DIR"
        print(f"  {name}: {command} {' '.join(words)}")
    return 0


def vqa_score(values: flags.FlagValues) -> int:
    """Scores the answers of a multimodal model."""
    from perception_jax.systems.mmvp import scoring

    out = _folder(values.out)
    files = scoring.ProtocolFiles(
        data=pathlib.Path(values.data),
        answers=pathlib.Path(values.answers),
        out=out,
        replies=None if values.replies is None else pathlib.Path(values.replies),
        patterns=None if values.patterns is None else pathlib.Path(values.patterns),
        corrected=values.corrected,
    )
    found = scoring.score(values.protocol, files)
    print(found.text)
    _write_json(out / "results.json", dict(found.numbers))
    return 0


def vqa_export(values: flags.FlagValues) -> int:
    """Writes answers in lmms-eval's format, for benchmarks that are not scored here."""
    import datetime

    from perception_jax.systems.mmvp import scoring

    files = scoring.ProtocolFiles(
        data=pathlib.Path(values.data),
        answers=pathlib.Path(values.answers),
        out=_folder(values.out),
    )
    written = scoring.export_samples(
        values.benchmark,
        files,
        identity=values.id,
        target=values.target,
        time=datetime.datetime.now().strftime("%Y%m%d_%H%M%S"),
    )
    print("\n".join(map(str, written)))
    return 0


COMMANDS = {
    "blind_pairs": (define_blind_pairs_flags, blind_pairs),
    "mmvp_vlm": (define_vlm_flags, mmvp_vlm),
    "vqa_questions": (define_questions_flags, vqa_questions),
    "vqa_score": (define_score_flags, vqa_score),
    "vqa_export": (define_export_flags, vqa_export),
}
"""Flags and function of each command; see `launch.systems.HasCommands`."""


def _mesh() -> Mesh | None:
    """All devices of this process; None for one."""
    import jax

    from perception_jax.shard.mesh import make_mesh

    devices = jax.local_devices()
    return make_mesh(devices=devices) if len(devices) > 1 else None


def _mined_images(images: str | None, out: pathlib.Path) -> pathlib.Path | None:
    """The folder to search; that of scenes is written first."""
    if images != _SCENES:
        return None if images is None else pathlib.Path(images)
    from perception_jax.data.scenes.sample import SceneConfig
    from perception_jax.systems.mmvp import scenes

    scenes.write_images(out / _SCENES, SceneConfig(canvas=_CANVAS, split="test"))
    return out / _SCENES


def _vlm_data(data: str, out: pathlib.Path) -> pathlib.Path:
    """The benchmark's folder; that of scenes is written first."""
    if data != _SCENES:
        return pathlib.Path(data)
    from perception_jax.data.scenes.sample import SceneConfig
    from perception_jax.systems.mmvp import scenes

    folder = out / _SCENES
    scenes.write_vlm(folder, scenes.draw_pairs(SceneConfig(canvas=_CANVAS, split="test")))
    return folder


def _processes(share: str | None) -> tuple[tuple[int, int], Callable[[], None] | None]:
    """The share of this process, and what waits for the others of its job; joins that job first.

    Raises:
      ConfigError: a share that is none.
    """
    if share is not None:
        return _share(share), None
    from perception_jax.shard import distributed

    info = distributed.initialize()

    def wait() -> None:
        distributed.exchange("blind pairs", "", timeout_seconds=_DAY)

    return (info.index, info.count), wait if info.count > 1 else None


def _share(text: str) -> tuple[int, int]:
    """Reads "3/16".

    Raises:
      ConfigError: it is something else.
    """
    from perception_jax.errors import ConfigError

    index, mark, count = text.partition("/")
    if mark and index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    raise ConfigError(f"--share: expected INDEX/COUNT with INDEX below COUNT, found {text!r}.")


def _folder(path: str | pathlib.Path) -> pathlib.Path:
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(path: pathlib.Path, text: str) -> None:
    from perception_jax.files import write_whole

    write_whole(path, text)


def _write_json(path: pathlib.Path, content: Any) -> None:
    import json

    _write(path, json.dumps(content, indent=2) + "\n")
    print(f"results     {path}")
