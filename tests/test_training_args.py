"""Arguments: defaults, both parsers, conversion, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments
from trl import SFTConfig, TrlParser

from left_trainer import LeftTrainingArguments, list_methods

# A value for each type that differs from most defaults; fields whose value has to be of a kind are named below.
SPECIAL = {
    "eval_strategy": "steps",
    "eval_steps": 7,
    "save_strategy": "steps",
    "logging_strategy": "epoch",
    "hub_strategy": "end",
    "lr_scheduler_type": "cosine",
    "optim": "sgd",
    "report_to": ["tensorboard"],
    "peft_method": "ia3",
    "peft_kwargs": {"init_ia3_weights": False},
    "bf16": True,
    "use_cpu": True,
    "log_level": "info",
    "log_level_replica": "error",
    "train_sampling_strategy": "group_by_length",
    "generation_config": "somewhere",
    "accelerator_config": {"split_batches": True},
    "packing_strategy": "wrapped",
    "truncation_mode": "keep_start",
    "loss_type": "dft",
    "pad_to_multiple_of": 8,
    "include_num_input_tokens_seen": True,
    "neftune_noise_alpha": 5.0,
    "parallelism_config": None,
    "trackio_space_id": "space",
    "optim_target_modules": "a",
}
# Fields whose value excludes another one above, warns by design or means several things; tested one at a time.
ALONE = {
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "auto_find_batch_size": True,
    "bf16_full_eval": True,
    "dataloader_multiprocessing_context": "fork",
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 3,
    "disable_tqdm": True,
    "do_eval": True,
    "do_predict": True,
    "do_train": True,
    "enable_jit_checkpoint": True,
    "full_determinism": True,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "load_best_model_at_end": True,
    "pad_token": "<pad>",
    "push_to_hub": True,
    "save_on_each_node": True,
}
NEEDED_BESIDE = {
    "load_best_model_at_end": {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5, "save_steps": 5},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 2},
    "dataloader_persistent_workers": {"dataloader_num_workers": 2},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 2},
    "bf16_full_eval": {"use_cpu": True},
}
# Their values need a GPU, a launcher or a package that the tests do not have; transformers' own parser cannot read the
# dict of liger_kernel_config from a flag.
NOT_HERE = {
    "ddp_backend", "deepspeed", "debug", "fp16", "fp16_full_eval", "fsdp", "fsdp_config", "liger_kernel_config",
    "parallelism_config", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel",
}  # fmt: skip
UNTESTED = {*ALONE, *NOT_HERE}


def sample_values():
    values = dict(SPECIAL)
    for field in dataclasses.fields(LeftTrainingArguments):
        if not field.init or field.name in values or field.name in UNTESTED:
            continue
        default = field.default if field.default is not dataclasses.MISSING else None
        kind = str(field.type)
        if isinstance(default, bool):
            values[field.name] = not default
        elif isinstance(default, int):
            values[field.name] = default + 3
        elif isinstance(default, float):
            values[field.name] = default / 2 + 0.25
        elif "dict" in kind:
            values[field.name] = {"a": 1}
        elif "list" in kind:
            values[field.name] = ["a"]
        elif "int" in kind:
            values[field.name] = 3
        elif "float" in kind:
            values[field.name] = 0.5
        elif "bool" in kind:
            values[field.name] = True
        else:
            values[field.name] = "word"
    return {name: value for name, value in values.items() if name not in UNTESTED}


def parsed_from_flags_and_yaml(values, folder):
    flags = []
    for name, value in values.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    (from_flags,) = HfArgumentParser(LeftTrainingArguments).parse_args_into_dataclasses(flags)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    (from_yaml,) = TrlParser(LeftTrainingArguments).parse_args_and_config(["--config", str(config)])
    return from_flags, from_yaml


def check_round_trip(values, folder):
    direct = LeftTrainingArguments(**values)
    for parsed in parsed_from_flags_and_yaml(values, folder):
        for name in values:
            value = getattr(parsed, name)
            assert (str(value) if isinstance(value, Path) else value) == getattr(direct, name), name


@pytest.mark.filterwarnings("ignore")
def test_every_field_round_trips_through_flags_and_yaml(tmp_path):
    check_round_trip({**sample_values(), "output_dir": str(tmp_path / "run")}, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(ALONE))
def test_fields_that_stand_alone_round_trip(name, tmp_path):
    if name not in {field.name for field in dataclasses.fields(LeftTrainingArguments)}:
        pytest.fail(f"{name} is no field any more; remove it from ALONE")
    values = {**NEEDED_BESIDE.get(name, {}), name: ALONE[name], "output_dir": str(tmp_path / "run")}
    assert values[name] != LeftTrainingArguments.__dataclass_fields__[name].default
    check_round_trip(values, tmp_path)


def test_all_fields_of_both_classes_are_there():
    ours = {field.name for field in dataclasses.fields(LeftTrainingArguments)}
    for theirs in (SFTConfig, Seq2SeqTrainingArguments):
        assert {field.name for field in dataclasses.fields(theirs)} <= ours


def test_hugging_faces_defaults_stand(tmp_path):
    ours = LeftTrainingArguments(output_dir=str(tmp_path))
    theirs = Seq2SeqTrainingArguments(output_dir=str(tmp_path))
    differing = {
        field.name
        for field in dataclasses.fields(Seq2SeqTrainingArguments)
        if getattr(ours, field.name) != getattr(theirs, field.name)
    }
    assert differing <= {"learning_rate", "train_sampling_strategy", "dataloader_pin_memory", "logging_dir"}
    assert (ours.learning_rate, ours.train_sampling_strategy) == (None, None)


@pytest.mark.parametrize("cls", [TrainingArguments, Seq2SeqTrainingArguments, SFTConfig])
@pytest.mark.filterwarnings("ignore")
def test_conversion_keeps_every_value(cls, tmp_path):
    names = {field.name for field in dataclasses.fields(cls) if field.init}
    values = {name: value for name, value in sample_values().items() if name in names}
    given = cls(**{**values, "output_dir": str(tmp_path), "hub_token": "secret"})
    converted = LeftTrainingArguments.from_arguments(given)
    for name in names:
        assert getattr(converted, name) == getattr(given, name), name


def test_a_class_with_other_fields_is_refused(tmp_path):
    @dataclasses.dataclass
    class Other(TrainingArguments):
        strange: int = 3

    with pytest.raises(TypeError, match="strange"):
        LeftTrainingArguments.from_arguments(Other(output_dir=str(tmp_path)))


def test_methods_and_options_are_checked_at_once(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'lora'"):
        LeftTrainingArguments(output_dir=str(tmp_path), peft_method="lorra")
    with pytest.raises(ValueError, match="Did you mean 'lora_alpha'"):
        LeftTrainingArguments(output_dir=str(tmp_path), peft_kwargs="lora_alpa=3")
    with pytest.raises(ValueError, match="has no options"):
        LeftTrainingArguments(output_dir=str(tmp_path), peft_method="full", peft_kwargs={"r": 3})


def test_every_method_is_accepted(tmp_path):
    for method in list_methods():
        for name in (method.name, *method.aliases):
            assert LeftTrainingArguments(output_dir=str(tmp_path), peft_method=name).peft_kwargs == {}


def test_no_memory_for_logits_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"linear_cross_entropy_workspace_bytes=0 .* use_linear_cross_entropy=False"):
        LeftTrainingArguments(output_dir=str(tmp_path), linear_cross_entropy_workspace_bytes=0)
