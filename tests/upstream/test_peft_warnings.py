"""What PEFT still warns about while it wraps a model, and left_trainer hides."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    BOFTConfig,
    EvaConfig,
    FrodConfig,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)

from package_walk import constant, home
from tiny import tiny_model

UPSTREAM_WARNINGS: tuple[str, ...] = constant("UPSTREAM_WARNINGS")

IDS = torch.tensor([[5, 6, 7]])


def wrap(config: Callable[..., PeftConfig], **options: Any) -> PeftModel:
    return get_peft_model(tiny_model("llama"), config(task_type="CAUSAL_LM", **options))


def run_frod() -> None:
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        wrap(FrodConfig, target_modules=["q_proj"])(input_ids=IDS)
    finally:
        torch.set_warn_always(always)


def load_adalora(folder: str) -> None:
    config = {"total_step": 4, "tinit": 1, "tfinal": 1, "init_r": 4, "target_r": 2, "target_modules": ["q_proj"]}
    model = wrap(AdaLoraConfig, **config)
    for step in range(1, 5):
        model(input_ids=IDS, labels=IDS).loss.backward()
        model.base_model.update_and_allocate(step)
    model.save_pretrained(folder)
    PeftModel.from_pretrained(tiny_model("llama"), folder)


# What makes each of the warnings; it gets a folder.
SOURCES: dict[str, Callable[[str], Any]] = {
    "`is_gradient_checkpointing`": lambda _: wrap(LoraConfig),
    "Unsupported layer type": lambda _: wrap(LNTuningConfig, target_modules=["input_layernorm"]),
    "Failed to load the CUDA extension": lambda _: wrap(BOFTConfig, boft_block_size=4, target_modules=["q_proj"]),
    "Sparse invariant checks": lambda _: run_frod(),
    "Detected that the base layer has no bias term": lambda _: wrap(BeftConfig, target_modules=["v_proj"]),
    "Setting boft_n_butterfly_factor to 1": lambda _: wrap(BOFTConfig, boft_block_size=4, target_modules=["q_proj"]),
    "`init_lora_weights` is 'eva'": lambda _: LoraConfig(init_lora_weights="eva"),
    "lora with eva initialization used with low_cpu_mem_usage=False": lambda _: wrap(
        LoraConfig, init_lora_weights="eva", eva_config=EvaConfig()
    ),
    r"The following (rank|alpha)_pattern keys did not match .*_proj": lambda _: get_peft_model(
        tiny_model("mixtral"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    ),
    r"The following rank_pattern keys did not match .*\.lora_E": load_adalora,
}


def test_every_hidden_warning_has_a_canary():
    assert set(SOURCES) == set(UPSTREAM_WARNINGS)


@pytest.mark.parametrize("message", UPSTREAM_WARNINGS)
def test_a_hidden_warning_is_still_given(message, tmp_path):
    if any(part in message for part in ("CUDA", "boft")) and torch.cuda.is_available():
        pytest.skip("BOFT builds its extension here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message)
        is_given = False
        try:
            SOURCES[message](str(tmp_path))
        except Warning:
            is_given = True
    assert is_given, f"Nothing warns of {message!r} any more: remove it from {home('UPSTREAM_WARNINGS')}."
