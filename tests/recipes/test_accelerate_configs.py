"""The config files for `accelerate launch`: each is read by accelerate, and starts a run where the machine can."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from places import REPOSITORY
from processes import ENVIRONMENT
from tiny import tiny_model

FOLDER = REPOSITORY / "recipes" / "accelerate"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
SMALL = ("--max_train_samples=16", "--max_eval_samples=4", "--max_steps=1", "--peft_method=lora")


def why_not_here(config: Path) -> str | None:
    """Why this machine cannot start the run that `config` describes; `None` where it can."""
    read = load_config_from_file(str(config))
    if read.num_machines > 1:
        return "needs two machines"
    if not read.use_cpu and torch.cuda.device_count() < read.num_processes:
        return f"needs {read.num_processes} GPUs"
    if read.distributed_type == DistributedType.DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        return "needs deepspeed"
    return None


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_file(config):
    read = load_config_from_file(str(config))
    assert read.num_processes > 1
    for given in (read.fsdp_config, read.deepspeed_config):
        assert all(key.startswith(("fsdp_", "zero", "offload_", "gradient_")) for key in given)


@pytest.mark.parametrize(("name", "model_type"), [("fsdp2", "llama"), ("fsdp2", "bart"), ("fsdp2_t5", "t5")])
def test_layers_are_units(name, model_type):
    given, model = load_config_from_file(str(FOLDER / f"{name}.yaml")).fsdp_config, tiny_model(model_type)
    assert given["fsdp_version"] == 2
    named = given.get("fsdp_transformer_layer_cls_to_wrap")
    units = {named} if named else set(model._no_split_modules)
    assert units & {type(module).__name__ for module in model.modules()}


@pytest.mark.long
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_file_starts_a_run(python, config, tmp_path):
    if reason := why_not_here(config):
        pytest.skip(f"{config.name} {reason}")
    launcher = [python, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    recipe = str(REPOSITORY / "recipes" / "lora_summarization.py")
    command = [*launcher, recipe, "--output_dir", str(tmp_path / "run"), *SMALL]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "training_report.json").read_text())["processes"] == 2
