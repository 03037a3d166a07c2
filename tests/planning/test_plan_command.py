"""`left-trainer plan` on configs alone: what it prints, advises, draws and refuses."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from left_trainer import LeftTrainingArguments
from left_trainer.cli.main import main
from left_trainer.planning.advice import changes
from left_trainer.runs.fine_tuning import training_parser
from tiny import CONFIGS, VOCABULARY_SIZE

SHAPE = ["--source_tokens", "16", "--target_tokens", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("config")
    LlamaConfig(**{**CONFIGS["llama"], "num_hidden_layers": 1}, vocab_size=VOCABULARY_SIZE).save_pretrained(path)
    return str(path)


def test_a_plan_as_data_and_as_a_plot(folder, tmp_path, capsys):
    plot = tmp_path / "plan.png"
    flags = [*SHAPE, "--device", "rtx-4090", "--json", "--plot", str(plot)]
    assert main(["plan", "--model_name_or_path", folder, *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["run_bytes"] >= record["peak_bytes"] == sum(record["parts"].values())
    assert record["step_seconds"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_does_not_fit_is_told_what_to_change(folder, capsys):
    flags = ["--source_tokens", "100", "--target_tokens", "8", "--per_device_train_batch_size", "384"]
    assert main(["plan", "--model_name_or_path", folder, *flags, "--memory_gib", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "The run does not fit into 0.5 GiB" in text
    assert "What to change:\n  --" in text
    assert "Largest batch that fits: " in text.partition("Together")[2]
    advice = text.partition("Together, the run needs ")[2].splitlines()
    assert float(advice[0].split()[0]) <= 0.5
    assert advice[1].split()[-2:-1] == ["--gradient_accumulation_steps"]
    assert max(map(len, text.splitlines())) <= 120
    capsys.readouterr()
    assert main(["plan", "--model_name_or_path", folder, *flags, *advice[1].split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run_bytes"] <= 0.5 * 2**30


@pytest.mark.parametrize("flags", [[], ["--shrink_to", "vocabulary=data"]])
def test_a_plan_says_that_it_is_of_the_whole_vocabulary(flags, folder, capsys):
    assert main(["plan", "--model_name_or_path", folder, *SHAPE, *flags]) == 0
    text = capsys.readouterr().out
    assert ("This plan is of the whole vocabulary" in text) == bool(flags)


def test_methods_are_ranked_by_memory(folder, capsys):
    flags = [*SHAPE, "--methods", "lora,full", "ia3", "--memory_gib", "8", "--device", "rtx-4090"]
    assert main(["plan", "--model_name_or_path", folder, *flags]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.split() == ["method", "needed", "trained", "parameters", "ms", "a", "step", "fits"]
    assert {row.split()[0] for row in rows} == {"lora", "full", "ia3"}
    needed = [float(row.split()[1]) for row in rows]
    assert needed == sorted(needed)
    assert all(row.endswith("yes") for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "rtx 409"], "Did you mean 'rtx-4090'?"),
        (["--memory_gib", "0"], "--memory_gib: 0 must be above 0"),
        (["--target_tokens", "0"], "--target_tokens: 0 must be at least 1"),
        (["--source_tokens", "-1"], "--source_tokens: -1 must be at least"),
        (["--source_tokens", "1000"], "longer than the 128 positions"),
        (["--source_tokens", "8", "--methods", "lorra"], "Did you mean 'lora'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_paragraph(flags, message, folder, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--model_name_or_path", folder, *flags])
    text = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in text
    assert text.strip().count("\n") == 0


def test_a_folder_without_a_config_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--model_name_or_path", str(tmp_path), *SHAPE])
    assert caught.value.code == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "full"])
def test_flags_of_changes_can_be_pasted(method, tmp_path):
    parser = training_parser(output_dir=str(tmp_path))
    args = LeftTrainingArguments(str(tmp_path), peft_method=method, predict_with_generate=True, report_to="none")
    found = list(changes(args, "float32"))
    assert len(found) >= 5
    for change in found:
        flags = ["--report_to", "none", "--peft_method", method, *change.flags.split()]
        model_args, _, parsed, *_ = parser.parse_args_and_config(flags)
        for name, value in change.values.items():
            assert getattr(model_args if name == "dtype" else parsed, name) == value


def test_lengths_and_hours_are_those_of_the_data(tmp_path, capsys):
    rows = [{"document": "w " * size, "summary": "w"} for size in (4, 40, 8, 40)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--train_file", str(file), "--per_device_train_batch_size", "1", "--num_train_epochs", "2", "--json"]
    flags += ["--source_column", "document", "--target_column", "summary"]
    assert main(["plan", *flags, "--device", "rtx-4090"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert 40 < record["source_tokens"] < 80
    assert record["mean_source_tokens"] < record["source_tokens"]
    assert (record["train_rows"], record["run_steps"]) == (3, 6)  # a row is held out
    assert record["run_seconds"] == pytest.approx(6 * record["step_seconds"], rel=0.3)
    assert main(["plan", *flags, "--source_tokens", "9", "--target_tokens", "8"]) == 0
    assert json.loads(capsys.readouterr().out)["source_tokens"] == 9


def test_the_machine_at_hand_is_measured(folder, capsys):
    assert main(["plan", "--model_name_or_path", folder, *SHAPE, "--device", "this", "--memory_gib", "1e-3"]) == 0
    text = capsys.readouterr().out
    assert "s on this CPU, bound by" in text
    assert "The run fits into 0.001 GiB" in text
