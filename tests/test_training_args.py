"""Arguments: defaults, both parsers, conversion, and what is refused."""

from __future__ import annotations

import dataclasses
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
# Each needs hardware, a launcher or another package, warns by design, or excludes a value above.
UNTESTED = {
    "fp16", "tf32", "deepspeed", "fsdp", "fsdp_config", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "full_determinism", "load_best_model_at_end", "push_to_hub", "fp16_full_eval", "use_liger_kernel", "pad_token",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "debug", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "parallelism_config", "ddp_backend",
    "save_on_each_node", "jit_mode_eval", "bf16_full_eval", "auto_find_batch_size", "disable_tqdm", "do_train",
    "do_eval", "do_predict", "enable_jit_checkpoint", "place_model_on_device", "liger_kernel_config",
}  # fmt: skip


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


@pytest.mark.filterwarnings("ignore")
def test_every_field_round_trips_through_flags_and_yaml(tmp_path):
    values = {**sample_values(), "output_dir": str(tmp_path / "run")}
    direct = LeftTrainingArguments(**values)
    flags = []
    for name, value in values.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            text = yaml.safe_dump(value, default_flow_style=True).strip() if not isinstance(value, dict) else None
            flags += [f"--{name}", (text or __import__("json").dumps(value)).removesuffix("\n...").strip("'")]
    (from_flags,) = HfArgumentParser(LeftTrainingArguments).parse_args_into_dataclasses(flags)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    (from_yaml,) = TrlParser(LeftTrainingArguments).parse_args_and_config(["--config", str(config)])
    for name in values:
        expected = getattr(direct, name)
        for parsed in (getattr(from_flags, name), getattr(from_yaml, name)):
            assert (str(parsed) if isinstance(parsed, Path) else parsed) == expected, name


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
    assert differing <= {"learning_rate", "dataloader_pin_memory", "logging_dir"}
    assert ours.learning_rate is None


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
