"""What PEFT's LoRA and its relatives still do wrong, and left_trainer mends."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from datasets import Dataset
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PolyConfig,
    XLoraConfig,
    get_peft_model,
)
from peft.tuners.adalora.layer import AdaLoraLayer
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from method_settings import two_adapters
from package_walk import home
from tiny import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **options)


def adalora() -> AdaLoraConfig:
    return AdaLoraConfig(
        task_type="CAUSAL_LM", total_step=10, tinit=1, tfinal=1, init_r=4, target_r=1, target_modules=["q_proj"]
    )


def test_adalora_adds_its_penalty_in_evaluation_too():
    model = get_peft_model(tiny_model("llama"), adalora()).eval()
    with torch.no_grad():
        with_penalty = model(input_ids=IDS, labels=IDS).loss
        without = model.get_base_model()(input_ids=IDS, labels=IDS).loss
    assert with_penalty > without, (
        f"peft's AdaLoRA now leaves the loss of an evaluation alone: see what is left for {home('call_inner_model')}."
    )


def test_a_trainer_does_not_run_the_schedule_of_adalora(tmp_path, monkeypatch):
    model, calls = get_peft_model(tiny_model("llama"), adalora()), []
    monkeypatch.setattr(model.base_model, "update_and_allocate", lambda step: calls.append(step))
    rows = Dataset.from_dict({"input_ids": IDS.tolist() * 2, "labels": IDS.tolist() * 2})
    args = TrainingArguments(
        tmp_path, max_steps=1, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True
    )
    Trainer(model, args, train_dataset=rows).train()
    assert not calls, f"Trainer now runs AdaLoRA's schedule by itself: remove {home('AdaLoraCallback')}."


def test_adalora_saves_only_the_ranks_that_are_left(tmp_path):
    model = get_peft_model(tiny_model("llama"), adalora())
    for step in range(1, 11):
        model(input_ids=IDS, labels=IDS).loss.backward()
        model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    layers = [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
    whole = sum(layer.lora_E["default"].numel() for layer in layers)
    assert sum(tensor.numel() for name, tensor in saved.items() if name.endswith("lora_E")) < whole, (
        f"peft now saves every rank of AdaLoRA: see whether {home('collect_ranks')} can leave them out."
    )


def test_empty_factors_of_adalora_are_warned_of(tmp_path):
    model = get_peft_model(tiny_model("llama"), adalora())
    config = model.active_peft_config
    names = [name for name, module in model.base_model.model.named_modules() if isinstance(module, AdaLoraLayer)]
    config.rank_pattern = {f"{name}.lora_E": [False] * 4 for name in names}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path)
    assert any("have invalid shape" in str(warning.message) for warning in caught), (
        f"peft no longer warns of the empty factors of AdaLoRA: remove {home('without_saving_warnings')}."
    )


def test_names_of_experts_are_not_found(tmp_path):
    model = tiny_model("llama")
    model.config.use_cache = False
    found = False
    with contextlib.suppress(KeyError):
        config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters=two_adapters(tmp_path))
        found = logits(get_peft_model(model, config)) is not None
    assert not found, f"peft's X-LoRA now finds its experts by name: remove the numbers of {home('numbered_experts')}."


def test_the_classifier_of_x_lora_is_not_saved(tmp_path):
    model = tiny_model("llama")
    model.config.use_cache = False
    adapters = {str(number): path for number, path in enumerate(two_adapters(tmp_path).values())}
    wrapped = get_peft_model(model, XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters=adapters))
    wrapped.save_pretrained(tmp_path / "mixed")
    assert not load_file(tmp_path / "mixed" / "adapter_model.safetensors"), (
        f"peft now saves the classifier of X-LoRA: remove {home('save_with_classifier')}."
    )


def test_poly_keeps_one_task_for_each_row_of_the_input():
    config = PolyConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q"], n_tasks=2)
    model = get_peft_model(tiny_model("t5"), config).eval()
    inputs = {"input_ids": IDS.repeat(2, 1), "task_ids": torch.tensor([0, 1])}
    model.generate(**inputs, max_new_tokens=2)
    works = False
    with contextlib.suppress(RuntimeError):
        model.generate(**inputs, max_new_tokens=2, num_beams=2)
        works = True
    assert not works, f"peft's Poly now searches with beams: remove {home('repeat_task_ids')}."


def test_the_default_targets_of_mixtral_are_not_found():
    model, config = tiny_model("mixtral"), LoraConfig(task_type="CAUSAL_LM")
    found = True
    try:
        get_peft_model(model, config)
    except ValueError as error:
        found = "No `target_modules` passed" not in str(error)
    assert not found, f"PEFT finds the targets of Mixtral now: remove {home('with_named_targets')}."
