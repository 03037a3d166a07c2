"""The config files for `accelerate launch`: each is read by accelerate, and starts a run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from places import REPOSITORY, SUPPORT
from processes import ENVIRONMENT, free_port
from tiny import tiny_model

FOLDER = REPOSITORY / "recipes" / "accelerate"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
# Where it is not the embedded T5.
MODELS = {"fsdp2": "embedded/llama"}
SMALL = ("--max_train_samples=16", "--max_eval_samples=4", "--max_steps=1", "--peft_method=lora")


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
@pytest.mark.timeout(600)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_file_starts_a_run(python, config, tmp_path):
    """On CPUs where there are no GPUs: scored, trained, scored again and saved by two processes."""
    read = load_config_from_file(str(config))
    if read.distributed_type == DistributedType.DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        pytest.skip(f"{config.name} needs deepspeed")
    launcher = [python, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    launcher += ["--num_processes=2", f"--main_process_port={free_port()}"]
    recipe = [str(SUPPORT / "launched_on_cpu.py"), str(REPOSITORY / "recipes" / "lora_summarization.py")]
    options = [
        *SMALL,
        f"--output_dir={tmp_path / 'run'}",
        f"--model_name_or_path={MODELS.get(config.stem, 'embedded/t5')}",
    ]
    machines = [[f"--machine_rank={rank}"] if read.num_machines > 1 else [] for rank in range(read.num_machines)]
    commands = [[*launcher, *machine, *recipe, *options] for machine in machines]
    with contextlib.ExitStack() as stack:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": ENVIRONMENT}
        started = [stack.enter_context(subprocess.Popen(command, **pipes)) for command in commands]
        outputs = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), outputs[0][-3000:]
    report = json.loads((tmp_path / "run" / "training_report.json").read_text())
    assert report["processes"] == 2
    assert report["metrics"]["before"]["loss"] > 0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
