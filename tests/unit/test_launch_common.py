"""The programs' command line: overrides, messages with the nearest name, exit codes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import textwrap

import pytest
from absl import flags

from configs import common as config_common
from launch import common, systems
from perception_jax.errors import ConfigError, DataError, did_you_mean
from perception_jax.train.config import OptimConfig, TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
    import ml_collections

    def get_config(arg=None):
        return ml_collections.ConfigDict(dict(
            arg=arg or "",
            batch_size=8,
            flag=False,
            limit=ml_collections.config_dict.placeholder(int),
            optimizer=dict(learning_rate=0.1, betas=(0.9, 0.95)),
            styles=("noto", "twemoji"),
        ))
"""


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "A folder.", required=True, flag_values=values)
    flags.DEFINE_integer("steps", 3, "How many.", flag_values=values)
    flags.DEFINE_enum("to", "hf", ("hf", "reference"), "Layout.", flag_values=values)
    flags.DEFINE_multi_string("text", [], "Any number.", flag_values=values)


PROGRAM = common.Program(name="train", define=define_flags, config=True)


@pytest.fixture
def config_file(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "settings.py"
    file.write_text(textwrap.dedent(CONFIG))
    return file


def parse(config_file: pathlib.Path, *words: str) -> common.Parsed:
    return common.parse([f"--config={config_file}", "--workdir=w", *words], PROGRAM)


def test_parse_applies_argument_overrides_and_flags(config_file):
    words = ("--config.optimizer.learning_rate=3", "--config.flag", "--text=a, b", "--text=None")
    parsed = common.parse([f"--config={config_file}:short", "--workdir=w", *words], PROGRAM)
    assert parsed.config.optimizer.learning_rate == 3.0
    assert parsed.config.flag is True
    assert parsed.config.arg == "short"
    assert parsed.config.is_locked
    assert (parsed.defaults.optimizer.learning_rate, parsed.defaults.flag) == (0.1, False)
    assert parsed.defaults.arg == "short"
    assert (parsed.flags.workdir, parsed.flags.steps) == ("w", 3)
    assert parsed.flags.text == ["a, b", "None"]
    assert parsed.config_path == config_file


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("--config.batch_size=9", "batch_size", 9),
        ("--config.flag=true", "flag", True),
        ("--config.limit=7", "limit", 7),
        ("--config.arg=", "arg", ""),
        ("--config.styles=noto", "styles", ("noto",)),
        ("--config.styles=()", "styles", ()),
        ("--config.optimizer.betas=(1.0,0.5)", "optimizer.betas", (1.0, 0.5)),
    ],
)
def test_the_present_value_gives_the_type(config_file, word, key, value):
    config = parse(config_file, word).config
    for part in key.split("."):
        config = config[part]
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--config.optimiser.learning_rate=1", "Did you mean --config.optimizer.learning_rate?"),
        ("--config.learning_rate=1", "Did you mean --config.optimizer.learning_rate?"),
        ("--config.batchsize=1", "Did you mean --config.batch_size?"),
        ("--config.optimizer=1", "set one of them: --config.optimizer.betas"),
        ("--config.flag.x=1", "the config has no such setting"),
        ("--noconfig.flga", "Did you mean --config.flag?"),
        ("--config.batch_size=8.5", "--config.batch_size=8.5"),
        ("--config.batch_size=True", "--config.batch_size=True"),
        (
            "--config.optimizer.betas=(True,0.5)",
            "betas: expected elements of type float, found True",
        ),
        ("--config.styles=(7,)", "styles: expected elements of type str, found 7 (int)"),
        ("--config.flag=maybe", "--config.flag=maybe"),
        ("--config.batch_size", "--config.batch_size"),
        ("--workdri=x", "--workdri: there is no such flag. Did you mean --workdir?"),
        ("--to=hff", "hf|reference"),
        ("--steps=many", "--steps=many"),
        ("surplus", "unexpected argument 'surplus'"),
    ],
)
def test_usage_errors_name_what_is_wrong(config_file, word, said):
    with pytest.raises(common.UsageError) as error:
        parse(config_file, word)
    assert said in str(error.value)


def test_missing_words_are_usage_errors(config_file):
    for argv, said in (([f"--config={config_file}"], "--workdir"), (["--workdir=w"], "--config")):
        with pytest.raises(common.UsageError, match=said):
            common.parse(argv, PROGRAM)
    program = common.Program(name="x", define=lambda values: None, positional=("SRC", "DST"))
    assert common.parse(["a", "b"], program).positional == {"SRC": "a", "DST": "b"}
    with pytest.raises(common.UsageError, match="DST is missing"):
        common.parse(["a"], program)


def test_each_command_has_flags_of_its_own():
    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_integer("size", 1, "Side.", flag_values=values)

    program = common.Program(name="x", define={"first": define, "second": lambda values: None})
    parsed = common.parse(["first", "--size=3"], program)
    assert (parsed.command, parsed.flags.size) == ("first", 3)
    with pytest.raises(common.UsageError, match="--size: there is no such flag"):
        common.parse(["second", "--size=3"], program)
    with pytest.raises(common.UsageError, match="one of first, second, found 'third'"):
        common.parse(["third"], program)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:\n", r"settings\.py:1: "),
        ("import no_such_module_here\n", "No module named 'no_such_module_here'"),
        ("x = 1\n", "get_config"),
        ("def get_config(arg=None):\n    return {}\n", "ml_collections.ConfigDict, found dict"),
        (None, r"settings\.py does not exist in .* That folder has: .*other\.py"),
    ],
)
def test_config_files_that_cannot_be_used_are_named(tmp_path, text, said):
    file = tmp_path / "settings.py"
    (tmp_path / "other.py").write_text("")
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        parse(file)


def test_exit_codes_and_one_clear_line(config_file, capsys):
    argv = [f"--config={config_file}", "--workdir=w"]

    def fail(parsed):
        raise DataError("record 7 is not an image")

    def interrupt(parsed):
        raise KeyboardInterrupt

    assert common.main(PROGRAM, lambda parsed: None, argv) == 0
    assert common.main(PROGRAM, lambda parsed: 3, argv) == 3
    assert common.main(PROGRAM, fail, ["--nothing"]) == 2
    assert common.main(PROGRAM, interrupt, argv) == 130
    capsys.readouterr()
    assert common.main(PROGRAM, fail, argv) == 1
    line = "python -m launch.train: DataError: record 7 is not an image\n"
    assert capsys.readouterr().err == line
    assert common.main(PROGRAM, fail, [*argv, "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_nearest_name_or_all_of_them():
    assert did_you_mean("lr", ["train.lr", "loss"], prefix="--") == ". Did you mean --train.lr?"
    assert did_you_mean("zzz", ["a", "b"]) == ". Known: a, b."


def test_parse_arg_types_names_and_messages():
    arg = config_common.parse_arg("res=64, short,lr=1", res=32, short=False, lr=0.1, name="a")
    assert arg.to_dict() == {"res": 64, "short": True, "lr": 1.0, "name": "a"}
    assert config_common.parse_arg(None, res=32).res == 32
    with pytest.raises(common.UsageError, match=r"takes no 'shrt'\. Did you mean short\?"):
        config_common.parse_arg("shrt", res=32, short=False)
    for wrong in ("res=x", "res", "short=maybe"):
        with pytest.raises(common.UsageError, match="takes a value of type"):
            config_common.parse_arg(wrong, res=32, short=False)


def test_trainer_block_holds_exactly_the_fields_of_train_config():
    block = config_common.trainer(steps=10, batch_size=4, optim={"ema": 0.9, "clip_norm": None})
    expected = TrainConfig(steps=10, batch_size=4, optim=OptimConfig(ema=0.9, clip_norm=None))
    assert TrainConfig.from_mapping(block.to_dict()) == expected
    fields = dict.fromkeys(field.name for field in dataclasses.fields(TrainConfig))
    assert block.keys() == sorted(fields)
    with pytest.raises(ConfigError, match="Did you mean"):
        config_common.trainer(steps=10, batch_size=4, optim={"learning_rte": 1.0})


@pytest.mark.parametrize(
    "file",
    sorted(f for f in (ROOT / "configs").rglob("*.py") if f.stem not in ("__init__", "common")),
)
def test_every_config_file_is_one(file):
    config = common.parse([f"--config={file}", "--workdir=w"], PROGRAM).config
    if "train" in config:
        TrainConfig.from_mapping(config.to_dict()["train"])
        assert isinstance(systems.training_program(config), systems.Trains)
    else:
        assert isinstance(systems.planning_program(config), systems.Serves)
    assert json.loads(config.to_json())  # so it can be kept with the run
    with pytest.raises(ConfigError):
        common.parse([f"--config={file}:no_such_argument", "--workdir=w"], PROGRAM)


def test_a_setting_that_may_be_none_can_be_set(config_file):
    config_file.write_text(
        "from configs.common import trainer\n"
        "def get_config(arg=None):\n    return trainer(steps=10, batch_size=4)\n"
    )
    words = ("--config.optim.ema=0.5", "--config.optim.learning_rate=1")
    config = TrainConfig.from_mapping(parse(config_file, *words).config.to_dict())
    assert (config.optim.ema, config.optim.learning_rate) == (0.5, 1)


def test_a_system_that_there_is_not_is_named(config_file):
    config = parse(config_file).config
    with pytest.raises(ConfigError, match=r"no system None that trains. Known: contrastive, give"):
        systems.training_program(config)
    with config.unlocked():
        config.system = "gvie"
    with pytest.raises(ConfigError, match=r"no system 'gvie' that trains. Did you mean give\?"):
        systems.training_program(config)
    assert list(systems.predicting_programs()) == ["encoder", "give"]
