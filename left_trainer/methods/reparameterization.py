"""Methods that learn a low-dimensional update of existing weights: LoRA."""

from __future__ import annotations

from left_trainer.methods.method import PeftMethod
from left_trainer.methods.registry import register_method

QUERY_VALUE_NAMES = (
    ("q_proj", "v_proj"),
    ("q", "v"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
    ("Wqkv",),
)

register_method(
    PeftMethod(
        name="lora",
        family="reparameterization",
        summary="low-rank updates beside the query and value projections",
        paper="Hu et al., 2021, arXiv 2106.09685",
        config_class="LoraConfig",
        learning_rate=2e-4,
        learning_rate_source="Hu et al., 2021, GPT-2; benchmarks/learning_rates.py",
        defaults={"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
        target_candidates=tuple({"target_modules": list(names)} for names in QUERY_VALUE_NAMES),
        mergeable=True,
    )
)
