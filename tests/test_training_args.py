"""Arguments: defaults, both parsers, conversion, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from left_trainer import LeftTrainingArguments, list_methods
from left_trainer.methods.option_ranges import range_of
from left_trainer.methods.options import known_options, matches, nested_config
from left_trainer.ranges import is_number
from left_trainer.runs.fine_tuning import training_parser
from left_trainer.training_args import FLAGS_OF_OTHERS

# A value for each type that differs from most defaults; fields whose value has to be of a kind are named below.
SPECIAL = {
    "eval_strategy": "steps",
    "eval_steps": 7,
    "save_strategy": "steps",
    "logging_strategy": "epoch",
    "hub_strategy": "end",
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 1},
    "dataset_kwargs": {"a": 1},
    "model_init_kwargs": {"a": 1},
    "optim": "sgd",
    "report_to": ["tensorboard"],
    "peft_method": "ia3",
    "peft_kwargs": {"init_ia3_weights": False},
    "distillation_kwargs": {"alpha": 0.25},
    "shrink_to": "params=0.5",
    "shrink_kwargs": {"schedule": "linear"},
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
    assert not ours & set(FLAGS_OF_OTHERS)
    for theirs in (SFTConfig, Seq2SeqTrainingArguments):
        assert {field.name for field in dataclasses.fields(theirs)} <= ours | set(FLAGS_OF_OTHERS)


def test_what_is_no_flag_is_an_argument_all_the_same(tmp_path):
    @dataclasses.dataclass
    class Mine(LeftTrainingArguments):
        extra: int = 3

        def __post_init__(self):
            super().__post_init__()
            self.extra += 1

    values = {"trust_remote_code": True, "pad_token": "<pad>", "pad_to_multiple_of": 8}
    assert set(values) == set(FLAGS_OF_OTHERS)
    for cls in (LeftTrainingArguments, Mine, SFTConfig):
        given = cls(output_dir=str(tmp_path), use_cpu=True, **values)
        args = LeftTrainingArguments.from_arguments(given)
        others = [args, copy.copy(args), args.replaced(seed=3), dataclasses.replace(args, report_to="none")]
        if cls is not Mine:  # a local class cannot be pickled
            others.append(pickle.loads(pickle.dumps(args)))
        for other in others:
            assert {name: getattr(other, name) for name in values} == values
        assert values.items() <= args.to_dict().items()
    assert Mine(output_dir=str(tmp_path)).extra == 4
    defaults = LeftTrainingArguments(output_dir=str(tmp_path))
    assert (defaults.trust_remote_code, defaults.pad_token, defaults.pad_to_multiple_of) == (False, None, None)


# The fields of the classes beside the training arguments in Hugging Face's example scripts: run_summarization.py,
# run_translation.py, run_clm.py, run_fim.py, run_seq2seq_qa.py.
HUGGING_FACE = {
    "ModelArguments": (
        "model_name_or_path model_type config_overrides config_name tokenizer_name cache_dir use_fast_tokenizer "
        "model_revision token trust_remote_code dtype torch_dtype low_cpu_mem_usage resize_position_embeddings "
        "pad_to_multiple_of attn_implementation"
    ),
    "DataTrainingArguments": (
        "lang source_lang target_lang dataset_name dataset_config_name text_column summary_column context_column "
        "question_column answer_column train_file validation_file test_file overwrite_cache streaming block_size "
        "preprocessing_num_workers max_source_length max_target_length val_max_target_length max_seq_length "
        "max_answer_length val_max_answer_length pad_to_max_length max_train_samples max_eval_samples "
        "max_predict_samples num_beams ignore_pad_token_for_loss source_prefix forced_bos_token doc_stride "
        "version_2_with_negative null_score_diff_threshold n_best_size validation_split_percentage keep_linebreaks "
        "fim_rate fim_spm_rate truncate_or_pad fim_prefix_token fim_middle_token fim_suffix_token pad_token"
    ),
}


@pytest.mark.parametrize("position", range(3))
def test_flags_stand_beside_those_of_hugging_faces_scripts(position, tmp_path):
    classes = [
        dataclasses.make_dataclass(name, [(field, str | None, None) for field in fields.split()])
        for name, fields in HUGGING_FACE.items()
    ]
    classes.insert(position, LeftTrainingArguments)
    flags = ["--output_dir", str(tmp_path), "--peft_method", "ia3", "--trust_remote_code", "yes", "--pad_token", "<p>"]
    parsed = HfArgumentParser(classes).parse_args_into_dataclasses(flags)
    by_name = {type(item).__name__: item for item in parsed}
    assert by_name["LeftTrainingArguments"].peft_method == "ia3"
    assert by_name["ModelArguments"].trust_remote_code == "yes"
    assert by_name["DataTrainingArguments"].pad_token == "<p>"


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_flags_stand_beside_those_of_trls_scripts(parser, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--dataset_name", "x", "--model_name_or_path", "y", "--peft_method", "ia3"]
    classes = (ScriptArguments, LeftTrainingArguments, ModelConfig)
    _, args, _ = parser(classes).parse_args_into_dataclasses(flags)
    assert args.peft_method == "ia3"


def test_our_parser_hands_on_the_flags_of_the_model(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--trust_remote_code", "--pad_token", "<p>", "--pad_to_multiple_of", "8"]
    model_args, _, args = training_parser().parse_args_and_config(flags)
    assert (args.trust_remote_code, args.pad_token, args.pad_to_multiple_of) == (True, "<p>", 8)
    assert model_args.trust_remote_code is True


@pytest.mark.parametrize("method", list_methods(), ids=lambda method: method.name)
def test_options_of_every_type_go_into_json_and_back(method, tmp_path):
    """Sets, tuples, enums and config objects: trackers write the arguments as JSON, YAML files hold lists and dicts."""
    options = {}
    for name, hint in known_options(method).items():
        nested = nested_config(hint)
        candidates = [{"q", "v"}, ("q",), {"q": 1}, {0, 1}, 3, 1, 0.5, nested() if nested else None]
        allowed = range_of(method.config_class, name)
        usable = [
            value
            for value in candidates
            if value is not None and matches(value, hint) and (not is_number(value) or value in allowed)
        ]
        if name not in method.preset and usable:
            options[name] = usable[0]
    args = LeftTrainingArguments(output_dir=str(tmp_path), peft_method=method.name, peft_kwargs=options)
    read = json.loads(args.to_json_string())["peft_kwargs"]
    assert set(read) == set(options)
    assert isinstance(args.to_sanitized_dict()["peft_kwargs"], str)
    again = LeftTrainingArguments(output_dir=str(tmp_path), peft_method=method.name, peft_kwargs=read)
    assert json.loads(again.to_json_string())["peft_kwargs"] == read
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"peft_method": method.name, "peft_kwargs": read}))
    flags = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path)]
    (from_yaml,) = TrlParser(LeftTrainingArguments).parse_args_and_config(flags)
    assert json.loads(from_yaml.to_json_string())["peft_kwargs"] == read
    torch.save(args, tmp_path / "training_args.bin")
    assert set(torch.load(tmp_path / "training_args.bin", weights_only=False).peft_kwargs) == set(options)


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
