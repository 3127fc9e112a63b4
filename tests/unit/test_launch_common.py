"""The programs' command line: typed overrides, messages that name the nearest name, exit codes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import textwrap

import ml_collections
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import common as config_common
from launch import common, overrides
from perception_jax.errors import ConfigError, DataError
from perception_jax.train.config import OptimConfig, TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = common.Program(
    name="train",
    description="Trains a thing.",
    flags=(
        common.Flag("workdir", pathlib.Path, None, "Where everything goes.", required=True),
        common.Flag("steps", int, 3, "How many."),
        common.Flag("verify", bool, False, "Checks the result."),
        common.Flag("to", str, "hf", "Layout.", choices=("hf", "reference")),
    ),
    positional=(common.Argument("SOURCE", "What to read.", required=False),),
    examples=("python -m launch.train --config=configs/x.py --workdir=w",),
)
CONFIG = """
    import ml_collections

    def get_config(arg=None):
        return ml_collections.ConfigDict(dict(
            arg=arg,
            batch_size=8,
            flag=False,
            limit=ml_collections.config_dict.placeholder(int),
            name="a",
            optimizer=dict(learning_rate=0.1, betas=(0.9, 0.95)),
            sizes=[1, 2],
            styles=("noto", "twemoji"),
        ))
"""


@pytest.fixture
def config_file(tmp_path: pathlib.Path, request: pytest.FixtureRequest) -> pathlib.Path:
    # A module name is imported once per process, so each test has its own.
    file = tmp_path / f"config_{abs(hash(request.node.nodeid))}.py"
    file.write_text(textwrap.dedent(CONFIG))
    return file


def parse(config_file: pathlib.Path, *words: str) -> common.Parsed:
    return common.parse([f"--config={config_file}", "--workdir=w", *words], PROGRAM)


def test_parse_applies_argument_overrides_and_flags(config_file):
    parsed = parse(
        config_file,
        "--config.optimizer.learning_rate=3",
        "--config.flag",
        "--steps",
        "5",
        "--verify",
        "here",
    )
    assert parsed.config.optimizer.learning_rate == 3.0
    assert type(parsed.config.optimizer.learning_rate) is float
    assert parsed.config.flag is True
    assert parsed.config.is_locked
    assert dict(parsed.flags) == {
        "workdir": pathlib.Path("w"),
        "steps": 5,
        "verify": True,
        "to": "hf",
        "traceback": False,
    }
    assert parsed.positional == {"SOURCE": "here"}
    assert parsed.config_path == config_file
    assert parsed.config_arg is None


def test_the_later_config_wins_and_keeps_every_override(config_file):
    parsed = parse(config_file, "--config.batch_size=2", f"--config={config_file}:short,res=4")
    assert parsed.config.arg == "short,res=4"
    assert parsed.config_arg == "short,res=4"
    assert parsed.config.batch_size == 2


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("--config.batch_size=1_000", "batch_size", 1000),
        ("--config.flag=true", "flag", True),
        ("--config.name=3", "name", "3"),
        ("--config.name=", "name", ""),
        ("--config.limit=7", "limit", 7),
        ("--config.limit=None", "limit", None),
        ("--config.batch_size=None", "batch_size", None),
        ("--config.arg=(1, 2)", "arg", (1, 2)),
        ("--config.arg=red", "arg", "red"),
        ("--config.sizes=4", "sizes", [4]),
        ("--config.styles=noto", "styles", ("noto",)),
        ("--config.styles=('a','b')", "styles", ("a", "b")),
        ("--config.styles=()", "styles", ()),
        ("--config.optimizer.betas=1,0.5", "optimizer.betas", (1.0, 0.5)),
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
        ("--config.name.x=1", "name is a single value ('a')"),
        ("--config.batch_size=8.5", "expected a whole number (now 8), found '8.5'"),
        ("--config.flag=maybe", "expected true or false (now False), found 'maybe'"),
        ("--config.batch_size", "needs a value: write --config.batch_size=VALUE (now 8)"),
        ("--config.sizes=1,x", "expected values separated by commas"),
        ("--config.sizes=1,2.5", "expected elements of type int (now [1, 2]), found 2.5"),
        ("--config.sizes=1,True", "expected elements of type int (now [1, 2]), found True"),
        ("--config.sizes=__import__('os')", "expected values separated by commas"),
        ("--workdri=x", "--workdri: there is no such flag. Did you mean --workdir?"),
        ("--to=hff", "expected one of hf, reference, found 'hff'. Did you mean hf?"),
        ("--steps=many", "expected a whole number (now 3), found 'many'"),
        ("--config=", "write --config=FILE.py[:ARG]"),
    ],
)
def test_usage_errors_say_what_would_be_right(config_file, word, said):
    with pytest.raises(ConfigError) as error:
        parse(config_file, word)
    assert said in str(error.value)


def test_missing_and_surplus_words_are_usage_errors(config_file):
    config = f"--config={config_file}"
    for argv, said in (
        ([config], "--workdir is missing. Where everything goes."),
        (["--workdir=w"], "--config=FILE is missing"),
        (["--workdir=w", "--config.a=1"], "no --config=FILE is given"),
        ([config, "--workdir=w", "a", "b"], "unexpected argument 'b'"),
    ):
        with pytest.raises(common.UsageError, match=said):
            common.parse(argv, PROGRAM)


def test_positional_arguments_and_config_can_be_required_or_absent():
    program = common.Program(
        name="convert",
        description="Converts.",
        positional=(common.Argument("SRC"), common.Argument("KIND", choices=("clip", "bert"))),
        config="none",
    )
    assert common.parse(["a", "clip"], program).positional == {"SRC": "a", "KIND": "clip"}
    with pytest.raises(common.UsageError, match="KIND is missing"):
        common.parse(["a"], program)
    with pytest.raises(common.UsageError, match="Did you mean clip"):
        common.parse(["a", "clib"], program)
    with pytest.raises(common.UsageError, match="--config: there is no such flag"):
        common.parse(["a", "clip", "--config=x.py"], program)


def test_repeated_flags_add_up_and_take_texts_as_they_stand():
    flags = (
        common.Flag("text", default=(), repeated=True),
        common.Flag("size", int, (), "Sides.", repeated=True),
    )
    program = common.Program(name="any", description="", flags=flags, config="none")
    assert common.parse([], program).flags["text"] == ()
    words = ["--text=None", "--size=3", "--text", "a, b", "--text=", "--size=4"]
    found = common.parse(words, program).flags
    assert (found["text"], found["size"]) == (("None", "a, b", ""), (3, 4))
    for word, said in (("--size=x", "expected a whole number"), ("--text", "needs a value")):
        with pytest.raises(common.UsageError, match=said):
            common.parse(["--size=1", word], program)
    assert "--size=N …" in common.format_help(program)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:\n", r"broken_0\.py:1: "),
        ("import no_such_module_here\n", "cannot be imported: No module named"),
        ("x = 1\n", "expected a function get_config"),
        ("def get_config(arg=None):\n    return {}\n", "must return an ml_collections.ConfigDict"),
    ],
)
def test_broken_config_files_are_named(tmp_path, request, text, said):
    index = request.node.callspec.indices["text"]
    file = tmp_path / f"broken_{index}.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        common.parse([f"--config={file}", "--workdir=w"], PROGRAM)


def test_config_files_that_cannot_be_found_or_named(tmp_path):
    (tmp_path / "right_name.py").write_text("")
    with pytest.raises(ConfigError, match=r"does not exist.*right_name\.py"):
        common.load_config_module(tmp_path / "wrong_name.py")
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ConfigError, match=r"already belongs to .*rename the config file"):
        common.load_config_module(tmp_path / "json.py")
    (tmp_path / "no-name.py").write_text("")
    with pytest.raises(ConfigError, match="must be a Python name"):
        common.load_config_module(tmp_path / "no-name.py")


def test_help_shows_flags_examples_and_the_settings_of_a_config(config_file, capsys):
    assert common.main(PROGRAM, run=None, argv=["--help", f"--config={config_file}"]) == 0
    shown = capsys.readouterr().out
    usage = "usage: python -m launch.train [SOURCE] --config=FILE[:ARG] --workdir=PATH [flags]"
    assert shown.startswith(usage)
    for part in ("How many. (default: 3)", *PROGRAM.examples, "--config.optimizer.betas"):
        assert part in shown


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
    assert (
        capsys.readouterr().err == "python -m launch.train: DataError: record 7 is not an image\n"
    )
    assert common.main(PROGRAM, fail, [*argv, "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err


@given(
    value=st.one_of(
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text(min_size=1).filter(lambda text: text != "None"),
        st.lists(st.integers(), min_size=1).map(tuple),
        st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1).map(tuple),
    )
)
def test_what_python_prints_is_read_back(value):
    config = ml_collections.ConfigDict({"group": {"key": value}})
    text = value if isinstance(value, str) else repr(value)
    overrides.apply(config, [("group.key", text)])
    assert config.group.key == value
    assert type(config.group.key) is type(value)


def test_parse_arg_types_names_and_messages():
    arg = config_common.parse_arg("res=64, short,lr=1", res=32, short=False, lr=0.1, name="a")
    assert arg.to_dict() == {"res": 64, "short": True, "lr": 1.0, "name": "a"}
    assert config_common.parse_arg(None, res=32).res == 32
    with pytest.raises(common.UsageError, match=r"takes no 'shrt'\. Did you mean short\?"):
        config_common.parse_arg("shrt", res=32, short=False)
    with pytest.raises(common.UsageError, match="res=x: expected a whole number"):
        config_common.parse_arg("res=x", res=32)
    with pytest.raises(common.UsageError, match="res needs a value: write res=VALUE"):
        config_common.parse_arg("res", res=32)


def test_trainer_block_holds_exactly_the_fields_of_train_config():
    block = config_common.trainer(steps=10, batch_size=4, optim={"ema": 0.9, "clip_norm": None})
    expected = TrainConfig(steps=10, batch_size=4, optim=OptimConfig(ema=0.9, clip_norm=None))
    assert TrainConfig.from_mapping(block.to_dict()) == expected
    fields = dict.fromkeys(field.name for field in dataclasses.fields(TrainConfig))
    assert block.keys() == sorted(fields)


@pytest.mark.parametrize(
    "file",
    sorted(f for f in (ROOT / "configs").rglob("*.py") if f.stem not in ("__init__", "common")),
)
def test_every_config_file_is_one(file):
    program = common.Program(name="any", description="")
    parsed = common.parse([f"--config={file}"], program)
    TrainConfig.from_mapping(parsed.config.to_dict()["train"])
    assert callable(parsed.module.get_task)
    assert json.loads(parsed.config.to_json())  # so it can be kept with the run
    with pytest.raises(ConfigError):
        common.parse([f"--config={file}:no_such_argument"], program)


def test_trainer_block_can_be_set_from_the_command_line():
    block = config_common.trainer(steps=10, batch_size=4)
    overrides.apply(
        block, [("optim.ema", "0.5"), ("optim.clip_norm", "None"), ("optim.learning_rate", "1")]
    )
    config = TrainConfig.from_mapping(block.to_dict())
    assert (config.optim.ema, config.optim.clip_norm, config.optim.learning_rate) == (0.5, None, 1)
    with pytest.raises(ConfigError, match="Did you mean"):
        config_common.trainer(steps=10, batch_size=4, optim={"learning_rte": 1.0})
    with pytest.raises(common.UsageError, match="expected a number"):
        overrides.apply(block, [("optim.ema", "soon")])
