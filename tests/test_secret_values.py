"""Tokens and passwords: however they are given, nothing that a command leaves, shows or starts has them."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml

from left_trainer import DataArguments, LeftTrainer, LeftTrainingArguments, ModelArguments
from left_trainer.cli.main import main
from left_trainer.comparison.cell import Cell
from left_trainer.comparison.flags import flags_of, parse_flags
from left_trainer.models import FAMILIES
from left_trainer.runs.fine_tuning import training_parser
from left_trainer.secret_values import TOKEN_VARIABLE, is_secret, masked, shown_command
from planted import PASSWORD, SECRETS, TOKEN, leaks
from processes import ENVIRONMENT
from tiny import tiny_rows

CLASSES = (ModelArguments, DataArguments, LeftTrainingArguments)
WORDS = re.compile("token|key|secret|pass|auth|cred|login|cookie|signature")
# Fields whose names have such a word and that hold no secret; a new one has to be sorted in here or in SECRET_NAME.
PUBLIC = {"pad_token", "eos_token", "average_tokens_across_devices", "include_num_input_tokens_seen"}
HIDDEN_IN = {"hub_token": TOKEN, "model_init_kwargs": {"token": PASSWORD, "revision": "main"}}
SECRET_NAMES = ("token", "hub_token", "use_auth_token", "api_key", "password", "secret", "aws_secret_access_key")
SECRET_NAMES += ("sas_token", "AWS_SESSION_TOKEN", "account_key", "Authorization", "connection_string", "client_secret")
DICTS = [item.name for item in dataclasses.fields(LeftTrainingArguments) if "dict" in str(item.type)]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What a command puts there is gone after the test."""
    monkeypatch.setenv(TOKEN_VARIABLE, "")
    monkeypatch.setattr("left_trainer.secret_values._seen", set())


def test_every_field_that_holds_a_secret_is_known():
    suspect = {item.name for cls in CLASSES for item in dataclasses.fields(cls) if WORDS.search(item.name)}
    assert {name for name in suspect if not is_secret(name)} == PUBLIC
    for cls in CLASSES:
        assert not [item.name for item in dataclasses.fields(cls) if is_secret(item.name) and item.default is not None]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name", ["pad_token", "bos_token", "max_new_tokens", "num_virtual_tokens", "token_dim", "keys"]
)
def test_names_of_other_things(name):
    assert not is_secret(name)


def test_saved_and_shown_arguments_have_no_secret():
    args = LeftTrainingArguments(report_to="none", **HIDDEN_IN)
    model_args = ModelArguments(token=TOKEN)
    shown = [str(args), repr(args), str(args.to_sanitized_dict()), args.to_json_string(), repr(model_args)]
    assert not [text for text in shown if any(value in text for value in SECRETS)]
    assert not any(value.encode() in pickle.dumps(args) for value in SECRETS)
    loaded = pickle.loads(pickle.dumps(args))
    assert (loaded.hub_token, loaded.model_init_kwargs) == (None, {"revision": "main"})
    for same in (args, copy.copy(args), copy.deepcopy(args), args.replaced(seed=3)):
        assert {name: getattr(same, name) for name in HIDDEN_IN} == HIDDEN_IN


@pytest.mark.parametrize("name", DICTS)
def test_a_secret_in_any_dict_of_the_arguments_stays_out_of_files(name):
    args = LeftTrainingArguments(report_to="none")
    setattr(args, name, {"a": [{"password": PASSWORD, "url": f"https://me:{PASSWORD}@host/x?token={PASSWORD}&b=1"}]})
    assert not any(value.encode() in pickle.dumps(args) for value in SECRETS)
    assert PASSWORD not in repr(args)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://me:{PASSWORD}@host/a.jsonl", "https://***@host/a.jsonl"),
        (f"s3://key:{PASSWORD}@bucket/a?x=1", "s3://***@bucket/a?x=1"),
        (f"https://host/a?b=1&token={PASSWORD}#c", "https://host/a?b=1&token=***#c"),
        (f"https://host/a?X-Amz-Signature={PASSWORD}", "https://host/a?X-Amz-Signature=***"),
        (f"no such key {TOKEN}.", "no such key ***."),
        ("https://host/a@b?page=2 and me@host", "https://host/a@b?page=2 and me@host"),
    ],
)
def test_texts_that_are_shown(text, shown):
    assert masked(text) == shown


def test_an_error_may_repeat_a_token_that_looks_like_nothing():
    ModelArguments(token=PASSWORD)
    assert masked(f"Illegal header value b'Bearer {PASSWORD}'") == "Illegal header value b'Bearer ***'"


WAYS = {
    "flag": (["--token", TOKEN], {}),
    "flag with =": ([f"--token={TOKEN}"], {}),
    "dashes": (["--hub-token", TOKEN], {}),
    "hub_token": (["--hub_token", TOKEN], {}),
    "loading options": (["--model_init_kwargs", json.dumps({"token": TOKEN, "revision": "main"})], {}),
    "yaml": ([], {"token": TOKEN}),
    "yaml of a task": ([], {"tasks": [{"task": "summarization", "hub_token": TOKEN}]}),
    "yaml of a method": ([], {"methods": [{"peft_method": "lora", "model_init_kwargs": {"token": TOKEN}}]}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_comparison_hands_a_token_on_by_the_environment(way):
    flags, content = WAYS[way]
    entries = [
        {key: value for key, value in item.items() if key not in ("task", "peft_method")}
        for item in content.get("tasks", content.get("methods", [content]))
    ]
    given = parse_flags([*flags, *flags_of(entries[0])])
    assert os.environ[TOKEN_VARIABLE] == TOKEN
    assert TOKEN not in str(given)
    assert TOKEN not in shown_command(["left-trainer", "compare", *flags, "--methods", "lora"])


def test_two_tokens_are_refused_without_showing_them():
    with pytest.raises(ValueError, match="Several tokens") as error:
        parse_flags(["--token", TOKEN, "--hub_token", PASSWORD])
    assert not any(value in str(error.value) for value in SECRETS)


def test_a_shown_command_keeps_everything_else():
    words = ["--pad_token", "<pad>", "--token", "x y", "--methods", "lora", "ia3", "--hub_token=z", "--bf16"]
    assert shown_command(words) == "--pad_token '<pad>' --methods lora ia3 --bf16"
    assert shown_command(["--token", "--bf16"]) == "--bf16"


def test_a_cell_that_version_0_1_wrote_loses_its_token():
    content = {"kind": "base", "task": "x", "arguments": {"token": TOKEN, "seed": 1}, "conditions": {}}
    content |= {"general_text_file": None, "save_adapter": False, "tuning": None}
    assert dict(Cell.from_json(content).arguments) == {"seed": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_that_a_run_leaves_has_a_secret(family, saved_models, rows, tmp_path, capfd):
    options = {
        "report_to": "none",
        "logging_steps": 1,
        "save_steps": 1,
        "max_steps": 2,
        "eval_strategy": "steps",
    }
    args = LeftTrainingArguments(output_dir=str(tmp_path / "run"), **options, **HIDDEN_IN)
    trainer = LeftTrainer(str(saved_models[family]), args, train_dataset=rows, eval_dataset=rows)
    assert trainer.args.hub_token == TOKEN  # a push needs it
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert torch.load(tmp_path / "run" / "training_args.bin", weights_only=False).hub_token is None
    assert leaks(tmp_path, *capfd.readouterr()) == []
    again = LeftTrainingArguments(output_dir=str(tmp_path / "run"), **{**options, "max_steps": 3}, hub_token=TOKEN)
    resumed = LeftTrainer(
        str(saved_models[family]), again.replaced(resume_from_checkpoint=True), train_dataset=rows, eval_dataset=rows
    )
    resumed.train(resume_from_checkpoint=True)
    assert resumed.args.hub_token == TOKEN
    assert leaks(tmp_path, *capfd.readouterr()) == []


def commands_of(process: subprocess.Popen[str]) -> set[str]:
    """The command lines of all processes that `process` has started."""
    found, waiting = set(), [process.pid]
    while waiting:
        pid = waiting.pop()
        try:
            tasks = list(Path(f"/proc/{pid}/task").iterdir())
            waiting += [int(child) for task in tasks for child in (task / "children").read_text().split()]
            found.add(Path(f"/proc/{pid}/cmdline").read_text())
        except (OSError, ValueError):
            continue
    return found


def test_nothing_that_a_comparison_leaves_or_starts_has_a_secret(python, saved_models, tmp_path):
    rows = [{"document": row["prompt"], "summary": row["completion"].strip()} for row in tiny_rows(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model_name_or_path": str(saved_models["encoder_decoder"]),
        "max_steps": 1,
        "generation_max_length": 4,
        "token": PASSWORD,
        "model_init_kwargs": {"token": PASSWORD},
        "methods": [{"peft_method": "lora", "hub_token": PASSWORD}],
        "tasks": [{"task": "summarization", "train_file": str(data), "test_file": str(data)}],
    }
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "grid.yaml").write_text(yaml.safe_dump(config))
    output = tmp_path / "compare"
    command = [python, "-m", "left_trainer.cli.main", "compare", "--config", str(tmp_path / "config" / "grid.yaml")]
    command += ["--output_dir", str(output), "--save_adapters"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, text=True)
        seen: set[str] = set()
        while process.poll() is None:
            seen |= commands_of(process)
            time.sleep(0.2)
    text = (tmp_path / "log").read_text()
    assert process.returncode == 0, text
    assert (output / "index.html").is_file()
    assert list(output.glob("cells/*/training_args.bin"))
    assert leaks(output, text, *seen) == []


def test_errors_do_not_repeat_a_secret(capsys, tmp_path):
    url = f"https://me:{PASSWORD}@host/rows.jsonl?token={TOKEN}"
    with pytest.raises(SystemExit) as ended:
        main(["train", "--train_file", url, "--token", PASSWORD, "--output_dir", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert leaks(tmp_path, *capsys.readouterr()) == []


def test_trackers_find_no_secret_on_the_command_line(monkeypatch):
    words = ["left-trainer", "methods", "--token", TOKEN]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr("sys.excepthook", None)
    with pytest.raises(SystemExit):
        main()
    assert words == ["left-trainer", "methods"]


def test_the_token_of_a_flag_reaches_the_model(monkeypatch):
    seen = {}
    monkeypatch.setattr("left_trainer.models.source.AutoConfig.from_pretrained", lambda *_, **given: seen.update(given))
    model_args, *_ = training_parser(output_dir="x").parse_args_into_dataclasses(["--token", TOKEN])
    with pytest.raises(ValueError, match="NoneType"):  # no config came back
        model_args.source(LeftTrainingArguments(report_to="none"))
    assert seen["token"] == TOKEN
