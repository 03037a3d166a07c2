"""Files that nobody can use, and some that one can, for the cases of bad input."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM

from left_trainer.embedded import MODEL_PATHS

ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "model.safetensors"
TOKENIZER = "tokenizer.json"
_LOCK = threading.Lock()
ROW = {"document": "a red house", "summary": "red"}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _set(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# What is done to a copy of an adapter, by the name of the folder.
ADAPTERS: dict[str, Callable[[Path], object]] = {
    "adapter": lambda folder: None,
    "adapter_without_weights": lambda folder: (folder / ADAPTER_WEIGHTS).unlink(),
    "adapter_cut": lambda folder: _cut(folder / ADAPTER_WEIGHTS),
    "adapter_empty": lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b""),
    "adapter_text": lambda folder: (folder / ADAPTER_WEIGHTS).write_text("not weights, but more than eight bytes"),
    "adapter_broken_config": lambda folder: _cut(folder / ADAPTER_CONFIG),
    "adapter_list_config": lambda folder: (folder / ADAPTER_CONFIG).write_text("[]"),
    "adapter_empty_config": lambda folder: (folder / ADAPTER_CONFIG).write_text(""),
    "adapter_binary_config": lambda folder: (folder / ADAPTER_CONFIG).write_bytes(b"\xff\xfe\x00"),
    "adapter_unknown_type": lambda folder: _set(folder / ADAPTER_CONFIG, peft_type="MAGIC"),
    "adapter_no_type": lambda folder: _set(folder / ADAPTER_CONFIG, peft_type=None),
    "adapter_no_base": lambda folder: _set(folder / ADAPTER_CONFIG, base_model_name_or_path=None),
    "adapter_missing_base": lambda folder: _set(folder / ADAPTER_CONFIG, base_model_name_or_path="/no/where"),
    "adapter_rank_zero": lambda folder: _set(folder / ADAPTER_CONFIG, r=0),
    "adapter_rank_text": lambda folder: _set(folder / ADAPTER_CONFIG, r="eight"),
    "adapter_broken_tokenizer": lambda folder: (folder / TOKENIZER).write_text("{"),
    "adapter_broken_report": lambda folder: (folder / "training_report.json").write_text("{"),
    "adapter_bad_prompt": lambda folder: _set_prompt(folder, "{source:>9999999999}"),
    "adapter_nested_prompt": lambda folder: _set_prompt(folder, "{source:{source}}"),
    "adapter_broken_settings": lambda folder: (folder / "run_settings.json").write_text("{"),
    "adapter_broken_generation": lambda folder: (folder / "generation_config.json").write_text("{"),
}
# The same for a whole model.
MODELS: dict[str, Callable[[Path], object]] = {
    "model_broken_config": lambda folder: _cut(folder / "config.json"),
    "model_list_config": lambda folder: (folder / "config.json").write_text("[]"),
    "model_empty_config": lambda folder: (folder / "config.json").write_text(""),
    "model_without_config": lambda folder: (folder / "config.json").unlink(),
    "model_unknown_type": lambda folder: _set(folder / "config.json", model_type="magic"),
    "model_no_type": lambda folder: _set(folder / "config.json", model_type=None),
    "model_text_layers": lambda folder: _set(folder / "config.json", num_layers="two"),
    "model_broken_tokenizer": lambda folder: _cut(folder / TOKENIZER),
    "model_object_tokenizer": lambda folder: (folder / TOKENIZER).write_text("{}"),
    "model_without_tokenizer": lambda folder: [path.unlink() for path in folder.glob("*token*")],
    "model_broken_generation": lambda folder: (folder / "generation_config.json").write_text("{"),
    "model_cut": lambda folder: _cut(folder / MODEL_WEIGHTS),
    "model_without_weights": lambda folder: (folder / MODEL_WEIGHTS).unlink(),
}
TEXTS = {
    "empty.jsonl": "",
    "rows.jsonl": (json.dumps(ROW) + "\n") * 40,
    "broken_line.jsonl": json.dumps(ROW) + "\n{\n",
    "other_columns.jsonl": '{"a": "x", "b": "y"}\n' * 4,
    "empty_target.jsonl": '{"document": "x", "summary": ""}\n' * 4,
    "numbers.jsonl": '{"document": 3, "summary": 4}\n' * 4,
    "rows.txt": "x\n",
    "blank.txt": "\n",
    "broken.yaml": "a: [1\n",
    "twice.yaml": "seed: 1\nseed: 2\n",
    "list.yaml": "- seed\n",
    "empty.yaml": "",
    "numbers.yaml": "1: 2\n",
    "unknown.yaml": "learning_rat: 1\n",
    "type.yaml": "max_steps: 1.5\n",
    "list_value.yaml": "learning_rate: [1]\n",
    "mapping_value.yaml": "num_train_epochs: {a: 1}\n",
    "text_number.yaml": "num_train_epochs: many\n",
    "flag.yaml": "bf16: 3\n",
    "choice.yaml": "dtype: int3\n",
    "null.yaml": "seed: null\n",
    "nan.yaml": "learning_rate: .nan\n",
    "scheduler.yaml": "lr_scheduler_type: foo\n",
    "environment.yaml": "env: [a]\n",
    "options.yaml": "peft_kwargs: {rank: 3}\n",
    "options_type.yaml": "peft_kwargs: [3]\n",
    "name_type.yaml": "model_name_or_path: 3\n",
    "prompt.yaml": "prompt: '{source!r}'\n",
    "empty_value.yaml": "train_file: ''\n",
    "methods.yaml": "methods: [{r: 3}]\n",
    "methods_number.yaml": "methods: [3]\n",
    "methods_unknown.yaml": "methods: [{peft_method: lora, rank: 3}]\n",
    "methods_option.yaml": "methods: [{peft_method: lora, peft_kwargs: {r: 0}}]\n",
    "methods_twice.yaml": "methods: [lora, lora]\n",
    "methods_mapping.yaml": "methods: {lora: 3}\n",
    "tasks_mapping.yaml": "tasks: [{task: summarization, train_file: nowhere.jsonl}]\n",
    "tasks_number.yaml": "tasks: 3\n",
    "seeds.yaml": "seeds: many\n",
    "seeds_float.yaml": "seeds: 1.5\n",
    "jobs.yaml": "jobs: many\n",
    "factors.yaml": "tune: learning_rate\ntune_factors: 3\n",
    "tune.yaml": "tune: [seed]\n",
    "save.yaml": "save_adapters: perhaps\n",
    "title.yaml": "title: [a]\n",
    "output.yaml": "output_dir: 3\n",
    "general.yaml": "general_text_file: 3\n",
    "config.yaml": "config: other.yaml\n",
    "broken.json": "{",
    "generation.json": '{"num_beams": "many"}',
    "file": "",
}


def _set_prompt(folder: Path, prompt: str) -> None:
    (folder / "training_report.json").write_text(json.dumps({"prompt": prompt}))


def bad_files() -> Path:
    """The folder with all of them, made once in a process. May be called from any thread."""
    with _LOCK:
        return _made_files()


@functools.cache
def _made_files() -> Path:
    root = Path(tempfile.mkdtemp(prefix="bad-input-"))
    base = MODEL_PATHS["encoder_decoder"]
    for name, text in TEXTS.items():
        (root / name).write_text(text)
    (root / "latin1.jsonl").write_bytes(
        (json.dumps(ROW) + "\n").encode() + b'{"document": "caf\xe9", "summary": "x"}\n'
    )
    (root / "latin1.yaml").write_bytes(b"title: caf\xe9\n")
    (root / "latin1.txt").write_bytes(b"caf\xe9\n")
    (root / "empty_folder").mkdir()
    (root / "folder").mkdir()
    (root / "folder" / "precious").write_text("precious")
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base), LoraConfig(task_type="SEQ_2_SEQ_LM", r=4))
    model.save_pretrained(root / "saved")
    for name, damage in ADAPTERS.items():
        shutil.copytree(root / "saved", root / name)
        damage(root / name)
    for name, damage in MODELS.items():
        shutil.copytree(base, root / name)
        damage(root / name)
    return root
