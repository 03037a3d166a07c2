"""Methods that add small modules or vectors: IA3."""

from __future__ import annotations

from left_trainer.methods.method import PeftMethod
from left_trainer.methods.registry import register_method

KEY_VALUE_FEEDFORWARD_NAMES = (
    ("k_proj", "v_proj", "down_proj"),
    ("k_proj", "v_proj", "fc2"),
    ("k", "v", "wo"),
    ("key", "value", "output.dense"),
    ("query_key_value", "dense_4h_to_h"),
    ("c_attn", "mlp.c_proj"),
)

register_method(
    PeftMethod(
        name="ia3",
        family="additive",
        summary="learned rescaling of keys, values and feed-forward activations",
        paper="Liu et al., 2022, arXiv 2205.05638",
        config_class="IA3Config",
        learning_rate=5e-3,
        learning_rate_source="near the 3e-3 that Liu et al., 2022, use with Adafactor; benchmarks/learning_rates.py",
        target_candidates=tuple(
            {"target_modules": list(names), "feedforward_modules": [names[-1]]} for names in KEY_VALUE_FEEDFORWARD_NAMES
        ),
        mergeable=True,
    )
)
