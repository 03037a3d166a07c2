"""What PEFT's ways to initialise an adapter still do wrong, and left_trainer mends."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from typing import Any

import pytest
import torch
from peft import (
    EvaConfig,
    FourierFTConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

from package_walk import home
from tiny import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **options)


def test_corda_cannot_be_loaded_again(tmp_path):
    model, config = tiny_model("llama"), lora(init_lora_weights="corda", corda_config=CordaConfig())
    preprocess_corda(model, config, run_model=lambda: logits(model))
    get_peft_model(model, config).save_pretrained(tmp_path)
    is_refused = False
    try:
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    except ValueError:
        is_refused = True
    assert is_refused, f"peft now loads CorDA's adapters: let it save them in {home('residual_base')}."


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_lora_ga_is_loaded_onto_the_unchanged_base(tmp_path):
    model, config = tiny_model("llama"), lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(model, config, train_step=lambda: model(input_ids=IDS, labels=IDS).loss.backward())
    saved = get_peft_model(model, config)
    saved.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert not torch.allclose(logits(loaded), logits(saved), atol=1e-3), (
        f"peft now loads LoRA-GA's adapters: let it save them in {home('residual_base')}."
    )


def eva() -> PeftModel:
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)
    )
    return get_peft_model(tiny_model("t5"), config, low_cpu_mem_usage=True)


def eva_rows(target: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS[:, :target]}] * 2


def test_eva_masks_a_decoder_by_the_source():
    initialize_lora_eva_weights(eva(), eva_rows(target=6), show_progress_bar=False)
    works = False
    with contextlib.suppress(IndexError, RuntimeError):
        initialize_lora_eva_weights(eva(), eva_rows(target=4), show_progress_bar=False)
        works = True
    assert not works, f"peft's EVA now masks a decoder by its target: remove layer_inputs of {home('initialize_eva')}."


def test_eva_waits_for_ever_for_tokens():
    passes = itertools.count()

    def one_token(layer_input: Any, batch: Any, name: str) -> torch.Tensor:
        if next(passes) > 20:
            raise TimeoutError
        return layer_input[0][0, :1]

    is_waiting = False
    try:
        initialize_lora_eva_weights(
            eva(), eva_rows(target=6), prepare_layer_inputs_fn=one_token, show_progress_bar=False
        )
    except TimeoutError:
        is_waiting = True
    assert is_waiting, (
        f"peft's EVA now notices that it has too few tokens: remove the check of {home('initialize_eva')}."
    )


def test_corda_takes_one_row_at_a_time():
    model, config = tiny_model("llama"), lora(init_lora_weights="corda", corda_config=CordaConfig())
    works = False
    with contextlib.suppress(RuntimeError):
        with torch.no_grad():
            preprocess_corda(model, config, run_model=lambda: model(IDS.repeat(2, 1)))
        works = True
    assert not works, f"peft's CorDA now takes a batch: see whether {home('_single_rows')} can go."


def test_lora_ga_lets_its_hooks_warn():
    model, config = tiny_model("llama"), lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        preprocess_loraga(model, config, train_step=lambda: model(input_ids=IDS, labels=IDS).loss.backward())
    assert any("Full backward hook is firing" in str(warning.message) for warning in caught), (
        f"peft's LoRA-GA no longer warns of its hooks: remove the filter of {home('initialize_lora_ga')}."
    )


def test_fourierft_starts_at_random():
    config = FourierFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], n_frequency=50)
    changed, base = logits(get_peft_model(tiny_model("llama"), config)), logits(tiny_model("llama"))
    assert not torch.allclose(changed, base, atol=1e-3), (
        "peft's FourierFT now starts at the base model: remove init_weights=True of fourierft in "
        f"{home('reparameterization')}."
    )


def test_a_target_that_matches_nothing_is_passed_over():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "no_such_module"])
    is_refused = True
    with contextlib.suppress(ValueError):
        get_peft_model(tiny_model("llama"), config)
        is_refused = False
    assert not is_refused, f"peft now refuses a target module that there is not: remove {home('check_patterns')}."
