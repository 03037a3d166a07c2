"""Errors on the command line: one paragraph, and no usage of 180 lines."""

from __future__ import annotations

import pytest

from left_trainer import training_parser
from left_trainer.argument_parser import ArgumentParser
from left_trainer.cli.errors import TRACEBACK_VARIABLE, user_errors


@pytest.fixture
def parser():
    parser = ArgumentParser(prog="tool")
    parser.add_argument("--count", type=int)
    parser.add_argument("--file")
    parser.add_argument("--names", nargs="+")
    return parser


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coun", "3"], "--coun is not an option. Did you mean 'count'?"),
        (["--count", "x"], "argument --count: 'x' is not an integer."),
        (["--file="], "argument --file: the value is empty."),
        (["--names", ""], "argument --names: the value is empty."),
        (["three"], "'three' belongs to no option."),
    ],
)
def test_one_paragraph(parser, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(flags)
    shown = capsys.readouterr().err
    assert stop.value.code == 2
    assert shown.startswith(f"tool: error: {message}")
    assert shown.count("\n") == 1


def write(folder, text):
    (folder / "run.yaml").write_text(text)
    return ["--config", str(folder / "run.yaml")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "Did you mean 'learning_rate'"),
        ("seed: 1\nseed: 2", "the key 'seed' stands twice"),
        ("max_steps: 1.5", "max_steps=1.5 .* must be an integer"),
        ("dtype: int3", "Expected one of float32"),
        ("a: [", "is not valid YAML"),
        ("- seed", "must contain a mapping"),
    ],
)
def test_a_yaml_file_is_checked_as_flags_are(text, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        training_parser().parse_args_and_config(write(tmp_path, text))


def test_flags_beat_the_yaml_file(tmp_path):
    flags = [*write(tmp_path, "seed: 3\nlearning_rate: 1e-3"), "--seed", "4"]
    *_, args = training_parser().parse_args_and_config(flags)
    assert (args.seed, args.learning_rate) == (4, 1e-3)


def test_an_error_of_another_type_keeps_its_traceback():
    with pytest.raises(KeyError), user_errors():
        raise KeyError("a fault of ours")


def test_the_traceback_can_be_seen(monkeypatch, capsys):
    with pytest.raises(SystemExit), user_errors():
        int("x")
    assert f"(ValueError of a library; {TRACEBACK_VARIABLE}=1 shows" in capsys.readouterr().err
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="invalid literal"), user_errors():
        int("x")
