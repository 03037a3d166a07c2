"""The command line: what it does on good input, and what it says to bad input."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from left_trainer import LeftTrainer, LeftTrainingArguments, ModelArguments, __version__, get_method, get_task
from left_trainer.cli.main import COMMANDS, main
from left_trainer.embedded import MODEL_NAMES
from left_trainer.runs.build_report import build_report
from left_trainer.trainer.preparation import choose_learning_rate
from processes import ENVIRONMENT
from tiny import tiny_rows


@pytest.fixture(scope="module")
def adapters(saved_models, tmp_path_factory):
    """A LoRA adapter and a fully trained model of each family, as `left-trainer train` leaves them."""
    folders = {}
    for family, base in saved_models.items():
        for method in ("lora", "prompt_tuning", "full"):
            folder = tmp_path_factory.mktemp(f"{family}-{method}")
            args = LeftTrainingArguments(
                output_dir=str(folder),
                peft_method=method,
                max_steps=2,
                learning_rate=1e-1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            )
            trainer = LeftTrainer(str(base), args, train_dataset=Dataset.from_list(tiny_rows()))
            trainer.train()
            trainer.save_model()
            report = build_report(trainer, get_task("summarization"), None, None, prompt="Say: {source}")
            report.write(folder)
            folders[family, method] = folder
    return folders


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("left-trainer")
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, env=ENVIRONMENT)


def fails(capsys, *arguments: str) -> str:
    """The message of a call that has to exit with 2, on one paragraph and without a traceback."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(arguments))
    assert exit_info.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "Traceback" not in message
    return message.splitlines()[-1]


def test_help_and_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert "Allowed: train" in fails(capsys, "trian")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([name, "--help"])
    assert exit_info.value.code == 0
    assert f"usage: left-trainer {name}" in capsys.readouterr().out


def test_train_writes_everything_and_reads_yaml(tmp_path, saved_models, capsys):
    rows = [{"document": row["prompt"], "summary": row["completion"].strip()} for row in tiny_rows(40)]
    Dataset.from_list(rows).to_json(str(tmp_path / "rows.jsonl"))
    config = tmp_path / "config.yaml"
    config.write_text(f"peft_method: ia3\nlearning_rate: 1e-2\ntrain_file: {tmp_path}/rows.jsonl\nmax_steps: 2\n")
    output = tmp_path / "out"
    flags = ["--output_dir", str(output), "--model_name_or_path", str(saved_models["decoder_only"])]
    result = command("train", "--task", "summarization", "--config", str(config), *flags, "--seed", "5")
    assert result.returncode == 0, result.stderr
    report = json.loads((output / "training_report.json").read_text())
    assert (report["method"], report["learning_rate"], report["seed"], report["train_steps"]) == ("ia3", 0.01, 5, 2)
    assert "Test scores, summarization with ia3" in result.stdout
    card = (output / "README.md").read_text()
    assert "## Results on summarization" in card
    assert "left-trainer generate" in card


def test_the_embedded_models_have_names(saved_models):
    args = LeftTrainingArguments()
    for name, path in MODEL_NAMES.items():
        source = ModelArguments(model_name_or_path=name, token="t").source(args)
        assert source.model == source.base_name == path
        assert source.options == {"dtype": "float32", "token": "t", "trust_remote_code": False}
    source = ModelArguments().source(args)
    assert source.model == MODEL_NAMES["embedded/t5"]
    lora = get_method("lora")
    assert choose_learning_rate(args, lora, source) == (lora.narrow_learning_rate, "default")
    assert choose_learning_rate(LeftTrainingArguments(learning_rate=1.0), lora, source) == (1.0, "given")
    assert (args.learning_rate, args.model_init_kwargs) == (None, None)


TRAIN = ["train", "--max_steps", "1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "sumarization"], "Did you mean 'summarization'"),
        (["--peft_method", "lorra"], "Did you mean 'lora'"),
        (["--peft_kwargs", "rank=3"], "'rank', which is not an option"),
        (["--peft_kwargs", '{"r": "x"}'], "type int"),
        (["--peft_kwargs", "target_modules=nope"], "matches no module"),
        (["--train_file", "missing.jsonl"], "does not exist"),
        (["--model_name_or_path", "no/where"], "neither a directory"),
        (["--packing", "true"], "no effect on an encoder-decoder model"),
        (["--output_dir", "/proc/nowhere/run"], "cannot be written"),
        (["--prompt", "x"], "needs {source} once"),
    ],
)
def test_bad_input_to_train(flags, message, capsys, monkeypatch, tmp_path, saved_models):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "left_trainer.trainer.preparation.load_model", lambda *a, **k: pytest.fail("weights were loaded")
    )
    defaults = ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(saved_models["encoder_decoder"])]
    assert message in fails(capsys, *TRAIN, *defaults, *flags)
    assert not (tmp_path / "out").exists()


def test_missing_column_and_result_in_the_way(capsys, tmp_path, saved_models):
    Dataset.from_list(tiny_rows()).to_json(str(tmp_path / "rows.jsonl"))
    flags = ["--model_name_or_path", str(saved_models["encoder_decoder"]), "--output_dir", str(tmp_path)]
    message = fails(capsys, *TRAIN, *flags, "--train_file", str(tmp_path / "rows.jsonl"))
    assert "Present: prompt, completion" in message
    (tmp_path / "adapter_model.safetensors").write_text("precious")
    assert "--overwrite_output_dir" in fails(capsys, *TRAIN, *flags)
    assert (tmp_path / "adapter_model.safetensors").read_text() == "precious"


@pytest.mark.parametrize("family", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "full"])
def test_generate(family, method, adapters, capsys, monkeypatch, tmp_path):
    texts = ["red", "green and blue", "black"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(texts) + "\n"))
    flags = ["--adapter", str(adapters[family, method]), "--max_new_tokens", "8"]
    assert main(["generate", *flags]) == 0
    from_stdin = capsys.readouterr().out.splitlines()
    assert len(from_stdin) == 3
    (tmp_path / "texts").write_text("\n".join(texts))
    assert main(["generate", *flags, "--input_file", str(tmp_path / "texts"), "--batch_size", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == from_stdin
    assert main(["generate", *flags, "--input_file", str(tmp_path / "texts"), "--num_beams", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_bad_input_to_generate(adapters, capsys, tmp_path, monkeypatch):
    assert "does not exist" in fails(capsys, "generate", "--adapter", "nowhere")
    assert "Pass --prompt" in fails(capsys, "generate", "--adapter", str(tmp_path))
    adapter = str(adapters["encoder_decoder", "lora"])
    assert "--input_file 'x' does not exist" in fails(capsys, "generate", "--adapter", adapter, "--input_file", "x")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert "no text to answer" in fails(capsys, "generate", "--adapter", adapter)
    assert "must be at least 1" in fails(capsys, "generate", "--adapter", adapter, "--num_beams", "0")


def test_generate_refuses_a_broken_report(capsys, tmp_path):
    report = tmp_path / "training_report.json"
    for content, message in (
        ("{", "is not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"prompt": 3}', "'method' is missing"),
    ):
        report.write_text(content)
        shown = fails(capsys, "generate", "--adapter", str(tmp_path))
        assert message in shown
        assert str(report) in shown


def test_merge(adapters, saved_models, tmp_path, capsys):
    adapter = adapters["encoder_decoder", "lora"]
    assert main(["merge", "--adapter", str(adapter), "--output_dir", str(tmp_path / "merged")]) == 0
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    from peft import PeftModel

    expected = PeftModel.from_pretrained(
        AutoModelForSeq2SeqLM.from_pretrained(saved_models["encoder_decoder"]), adapter
    ).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
        torch.testing.assert_close(merged(**inputs).logits, expected(**inputs).logits, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token == "<pad>"


def test_bad_input_to_merge(adapters, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    adapter = str(adapters["encoder_decoder", "lora"])
    assert "is not empty" in fails(capsys, "merge", "--adapter", adapter, "--output_dir", str(tmp_path / "full"))
    assert "does not exist" in fails(capsys, "merge", "--adapter", "nowhere", "--output_dir", str(tmp_path / "new"))
    soft = str(adapters["decoder_only", "prompt_tuning"])
    assert "cannot be merged" in fails(capsys, "merge", "--adapter", soft, "--output_dir", str(tmp_path / "new"))
    whole = str(adapters["encoder_decoder", "full"])
    assert "nothing to merge" in fails(capsys, "merge", "--adapter", whole, "--output_dir", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
