"""The record that describes one fine-tuning method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedConfig

from left_trainer.models import FAMILIES, ModelFamily

MethodFamily = Literal["soft_prompt", "additive", "reparameterization", "selective"]


@dataclass(frozen=True)
class PeftMethod:
    """What is trained, and what it takes to train it well. One frozen record per method.

    Args:
        name: What a user writes in `peft_method`.
        family: Where the method stands in the usual taxonomy (Lialin et al., 2023, arXiv 2303.15647).
        summary: One line for tables.
        paper: Authors, year and arXiv number.
        config_class: Name of the config class in `peft`; `None` trains the model's own parameters.
        learning_rate: Used when the user sets none.
        learning_rate_source: Where that value comes from.
        defaults: Options that differ from PEFT's own defaults.
        derive: Options that depend on the model's shape, computed from its config; a user's options beat them.
        target_candidates: Options that name modules, for model types that PEFT has no default for. The first entry
            whose modules all exist in the model is taken.
        aliases: Further names.
        model_families: Families of models that the method works on.
        mergeable: Whether the adapter can be folded into the base weights.
        gradient_checkpointing: Whether it works together with gradient checkpointing.
    """

    name: str
    family: MethodFamily
    summary: str
    paper: str
    config_class: str | None
    learning_rate: float
    learning_rate_source: str
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    derive: Callable[[PreTrainedConfig], dict[str, Any]] | None = None
    target_candidates: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    aliases: tuple[str, ...] = ()
    model_families: tuple[ModelFamily, ...] = FAMILIES
    mergeable: bool = False
    gradient_checkpointing: bool = True
