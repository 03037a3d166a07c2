"""Scripts in the shape of Hugging Face's and TRL's own run with nothing but the import and the trainer line changed."""

from __future__ import annotations

import json
import re
import string
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import MBart50Tokenizer

from places import REPOSITORY
from tiny import TINY_BART, tiny_model, tiny_rows, tiny_tokenizer

HERE = Path(__file__).parent
SCRIPTS = ("summarization", "translation", "language_modeling", "sft")
STEPS = 4
FLAGS = (
    "--per_device_train_batch_size 4 --learning_rate 3e-3 --seed 3 --report_to none --use_cpu True --disable_tqdm True"
)
GENERATES = "--do_train --do_eval --do_predict --predict_with_generate"


def with_left_trainer(script: str, argument: str) -> str:
    """`script` with the two lines changed that docs/migrating.md names."""
    changed, count = re.subn(
        r"^(    trainer = )\w*Trainer\(\n", rf"\1LeftTrainer(\n        {argument},\n", script, flags=re.MULTILINE
    )
    assert count == 1
    first = "\nfrom datasets import"
    return changed.replace(first, f"\nfrom left_trainer import LeftTrainer{first}", 1)


def test_the_page_shows_the_lines_that_are_changed():
    page = (REPOSITORY / "docs" / "migrating.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```diff\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]
    scripts = [(HERE / f"{name}_script.py").read_text(encoding="utf-8") for name in SCRIPTS]
    removed = {line[1:] for line in lines if line.startswith("-")}
    added = {line[1:] for line in lines if line.startswith("+")}
    for script in scripts:
        before, after = script.splitlines(), with_left_trainer(script, 'peft_method="lora"').splitlines()
        assert {line for line in before if line not in after} == {line for line in before if line in removed}
        assert {line for line in after if line not in before} == added


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A model of each kind with its tokenizer, and the rows of each script."""
    folder = tmp_path_factory.mktemp("material")
    rows = tiny_rows(16)
    for model_type, family in (("t5", "encoder_decoder"), ("llama", "decoder_only")):
        tiny_model(model_type).save_pretrained(folder / model_type)
        tiny_tokenizer(family).save_pretrained(folder / model_type)
    letters = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    tokenizer = MBart50Tokenizer(vocab=[*letters, *((token, -1.0) for token in ("▁", *string.ascii_letters))])
    ids = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 2}
    tiny_model("mbart", **{**TINY_BART, **ids}, vocab_size=len(tokenizer)).save_pretrained(folder / "mbart")
    tokenizer.save_pretrained(folder / "mbart")
    for name, made in {
        "summarization": [{"document": row["prompt"], "summary": row["completion"]} for row in rows],
        "translation": [{"translation": {"en": row["prompt"], "fr": row["completion"]}} for row in rows],
        "language_modeling": [{"text": row["prompt"] + row["completion"]} for row in rows],
    }.items():
        Dataset.from_list(made).to_json(str(folder / f"{name}.jsonl"))
    for split in ("train", "test"):
        Dataset.from_list(rows).to_parquet(str(folder / "sft" / f"{split}.parquet"))
    return folder


@pytest.fixture
def run(material, tmp_path, monkeypatch):
    """What a script leaves in its folder, after a run in this process."""
    command = {
        "summarization": f"--model_name_or_path {material}/t5 --train_file {material}/summarization.jsonl {GENERATES}",
        "translation": f"--model_name_or_path {material}/mbart --train_file {material}/translation.jsonl {GENERATES}",
        "language_modeling": (
            f"--model_name_or_path {material}/llama --train_file {material}/language_modeling.jsonl"
            " --do_train --do_eval"
        ),
        "sft": (
            f"--model_name_or_path {material}/llama --dataset_name {material}/sft --max_length 100 --bf16 False"
            " --gradient_checkpointing False --eval_strategy epoch --dtype float32"
        ),
    }

    def run(name: str, argument: str | None, output: str) -> Path:
        script = (HERE / f"{name}_script.py").read_text(encoding="utf-8")
        script = script if argument is None else with_left_trainer(script, argument)
        folder = tmp_path / output
        steps = f"--max_steps {STEPS} --logging_steps 1 --save_strategy no --output_dir {folder}"
        monkeypatch.setattr(sys, "argv", ["script.py", *command[name].split(), *FLAGS.split(), *steps.split()])
        namespace = {"__name__": "__main__"}
        exec(compile(script, f"{name}_script.py", "exec"), namespace)
        return folder

    return run


def logged_losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def scores(folder: Path) -> dict[str, float]:
    """What the script computed of predictions."""
    names = ("_letters_in_common", "_gen_len", "eval_accuracy")
    files = [json.loads(file.read_text()) for file in sorted(folder.glob("*_results.json"))]
    return {key: value for content in files for key, value in content.items() if key.endswith(names)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_full_fine_tuning_is_what_the_script_did_before(name, run):
    plain = run(name, None, "plain")
    for number, argument in enumerate(('peft_method="full"', "callbacks=None")):  # which names no method
        ours = run(name, argument, f"ours{number}")
        assert len(logged_losses(ours)) == STEPS
        assert logged_losses(ours) == pytest.approx(logged_losses(plain), abs=2e-4)
        assert scores(ours) == pytest.approx(scores(plain), abs=1e-6)
        assert bool(scores(ours)) == (name != "sft")
        assert {"config.json", "model.safetensors"} <= {file.name for file in ours.iterdir()}


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_another_method_is_one_argument(name, method, run):
    ours = run(name, f'peft_method="{method}"', "ours")
    assert len(logged_losses(ours)) == STEPS
    files = {file.name for file in ours.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json"} <= files
    assert "model.safetensors" not in files
    assert bool(scores(ours)) == (name != "sft")
