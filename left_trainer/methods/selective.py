"""Methods that train some of the model's own parameters: full fine-tuning trains all of them."""

from __future__ import annotations

from left_trainer.methods.method import PeftMethod
from left_trainer.methods.registry import register_method

register_method(
    PeftMethod(
        name="full",
        family="selective",
        summary="every parameter of the model",
        paper="Howard and Ruder, 2018, arXiv 1801.06146",
        config_class=None,
        learning_rate=5e-5,
        learning_rate_source="the default of transformers.TrainingArguments",
        aliases=("full_finetuning",),
    )
)
