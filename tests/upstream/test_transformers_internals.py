"""The internals of transformers that left_trainer overrides or reads."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, Trainer, TrainingArguments
from transformers.generation import GenerationMixin
from transformers.models.auto import modeling_auto

from package_walk import home
from tiny import tiny_model

ROWS = Dataset.from_dict({"input_ids": [[5, 6, 7, 1]] * 4, "labels": [[5, 6, 1]] * 4, "other": [0] * 4})
# What Trainer has to call in a run for our overrides to be heard, with the arguments that they take.
OVERRIDDEN = {
    "_get_train_sampler": ("train_dataset",),
    "_get_eval_sampler": ("eval_dataset",),
    "_set_signature_columns_if_needed": (),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "_prepare_inputs": ("inputs",),
    "_remove_unused_columns": ("dataset", "description"),
    "_save": ("output_dir", "state_dict"),
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_get_output_dir": ("trial",),
    "_save_checkpoint": ("model", "trial"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_finalize_training": ("trial", "num_train_samples", "start_time"),
}


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> dict[str, list[inspect.BoundArguments]]:
    """What a run that evaluates, saves, loads the best model and goes on from a checkpoint calls."""
    seen: dict[str, list[Any]] = {name: [] for name in OVERRIDDEN}

    class Recorder(Trainer):
        _signature_columns: list[str] | None

    def record(name: str) -> None:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            signature = inspect.Signature(
                [
                    inspect.Parameter(each, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
                    for each in OVERRIDDEN[name]
                ]
            )
            seen[name].append(signature.bind(*args, **kwargs))
            return getattr(Trainer, name)(self, *args, **kwargs)

        setattr(Recorder, name, call)

    for name in OVERRIDDEN:
        record(name)
    args = TrainingArguments(
        str(tmp_path_factory.mktemp("run")),
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    Recorder(tiny_model("t5"), args, train_dataset=ROWS, eval_dataset=ROWS).train()
    Recorder(tiny_model("t5"), args, train_dataset=ROWS, eval_dataset=ROWS).train(resume_from_checkpoint=True)
    return seen


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_trainer_calls_what_we_override(name, calls):
    assert calls[name], f"Trainer no longer calls {name} in a run, which {home(name)} overrides."


def make_trainer(folder: Any) -> Trainer:
    args = TrainingArguments(str(folder), report_to="none", use_cpu=True, per_device_train_batch_size=3)
    return Trainer(tiny_model("t5"), args, train_dataset=ROWS)


def test_the_columns_that_are_kept_are_a_list_that_may_grow(tmp_path):
    trainer, who = make_trainer(tmp_path), f"which {home('_set_signature_columns_if_needed')} extends"
    trainer._set_signature_columns_if_needed()
    assert isinstance(trainer._signature_columns, list), f"Trainer keeps no list _signature_columns any more, {who}."
    trainer._signature_columns.append("other")
    kept = next(iter(trainer.get_train_dataloader().dataset))
    assert "other" in kept, f"Trainer no longer keeps the columns in _signature_columns, {who}."


def test_trainer_knows_the_rows_of_a_batch(tmp_path):
    assert getattr(make_trainer(tmp_path), "_train_batch_size", None) == 3, (
        f"Trainer has no _train_batch_size any more, which {home('length_grouped_sampler')} reads."
    )


def test_trainer_counts_the_targets_of_batches(tmp_path):
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    trainer = make_trainer(tmp_path)
    trainer.model_accepts_loss_kwargs = True
    count = trainer._get_num_items_in_batch([{"labels": labels}], torch.device("cpu"))
    assert int(count) == 3, (
        f"Trainer's _get_num_items_in_batch no longer counts target tokens, which {home('prediction_step')} divides by."
    )


def test_seq2seq_trainer_reads_the_arguments_of_generation():
    from transformers import Seq2SeqTrainer

    assert "self._gen_kwargs" in inspect.getsource(Seq2SeqTrainer.prediction_step), (
        f"Seq2SeqTrainer no longer keeps a call's arguments in _gen_kwargs, as {home('GeneratingTrainer')} does."
    )


def test_a_config_knows_where_it_is_from(tmp_path):
    tiny_model("t5").config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path)._name_or_path == str(tmp_path), (
        "A config has no _name_or_path any more, by which "
        f"{home('load_tokenizer')}, {home('initialize_loftq')}, {home('model_family')} and {home('_save_plain_lora')} "
        "know the model."
    )


@pytest.mark.parametrize("model_type", ["t5", "bart", "llama", "gpt2"])
def test_attention_goes_through_an_interface_that_is_found_by_name(model_type):
    model, who = tiny_model(model_type), f"which {home('prefix_attention')} calls"
    named = (module for module in model.modules() if type(module).__name__.endswith("Attention"))
    module = next(module for module in named if hasattr(module, "config"))
    forward = inspect.unwrap(type(module).forward)
    assert model.config._attn_implementation in ("eager", "sdpa"), (
        f"A config has no _attn_implementation any more, which {home('RoutedConfig')} replaces."
    )
    assert "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names, (
        f"The attention of {model_type} no longer calls ALL_ATTENTION_FUNCTIONS, by which "
        f"{home('calls_attention_interface')} knows it."
    )
    assert callable(forward.__globals__.get("eager_attention_forward")), (
        f"The module of {model_type} has no eager_attention_forward any more, {who}."
    )
    assert hasattr(forward.__globals__["ALL_ATTENTION_FUNCTIONS"], "get_interface"), (
        f"transformers' attention functions have no get_interface any more, {who}."
    )


@pytest.mark.parametrize("family", ["CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM"])
def test_classes_of_models_are_found_by_type(family):
    names = getattr(modeling_auto, f"MODEL_FOR_{family}_MAPPING_NAMES", {})
    known = {"CAUSAL_LM": "gpt2", "MASKED_LM": "bert", "SEQ_TO_SEQ_CAUSAL_LM": "t5"}[family]
    assert isinstance(names.get(known), (str, tuple)), (
        f"transformers has no MODEL_FOR_{family}_MAPPING_NAMES from model types to class names any more, which "
        f"{home('model_family')} reads."
    )


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [("deepspeed", "is_deepspeed_zero3_enabled", ())],
)
def test_sharding_can_be_asked_for(module, name, arguments):
    ask = getattr(importlib.import_module(f"transformers.integrations.{module}"), name, None)
    assert ask is not None, f"{name} is elsewhere now, which {home('GenerationInEvaluation')} asks."
    assert ask(*arguments) is False, f"{name} answers differently now, which {home('GenerationInEvaluation')} asks."


def test_a_model_may_order_its_cache_itself():
    what = f"which {home('why_not_regrouped')} asks for"
    assert 'hasattr(self, "_reorder_cache")' in inspect.getsource(GenerationMixin), (
        f"_reorder_cache is not read, {what}"
    )
