"""The record that describes one fine-tuning method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from peft import PeftConfig, PeftModel, PromptLearningConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from left_trainer.adapters.training_state import TrainingState
from left_trainer.methods.learning_rates import learning_rate_at
from left_trainer.methods.virtual_tokens import Positions, VirtualTokens
from left_trainer.models import FAMILIES, ModelFamily

MethodFamily = Literal["soft_prompt", "additive", "reparameterization", "selective"]
# "sharded" spreads the weights over processes: FSDP, DeepSpeed ZeRO-3.
# "shrinking" takes blocks out of the base model, "narrowing" takes neurons and heads out of layers with an adapter.
Feature = Literal[
    "encoder_decoder",
    "decoder_only",
    "conv1d",
    "gradient_checkpointing",
    "packing",
    "quantized_base",
    "shrinking",
    "narrowing",
    "sharded",
]
Batches: TypeAlias = Callable[[int], Iterable[dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class PeftMethod:
    r"""What is trained, and what it takes to train it well. One frozen record per method.

    Args:
        name: What a user writes in `peft_method`.
        family: Where the method stands in the usual taxonomy (Lialin et al., 2023, arXiv 2303.15647).
        summary: One line for tables.
        paper: Authors, year and arXiv number.
        config_class: The method's PEFT config; `None` trains the model's own parameters.
        learning_rate: Used when the user sets none, for models at least `learning_rates.WIDE` wide.
        learning_rate_source: Where that value comes from.
        narrow_learning_rate: The same for models at most `learning_rates.NARROW` wide, from
            `benchmarks/learning_rates.py`; between the two, `learning_rate_at`. By default `learning_rate`.
        equation: In LaTeX: what a layer or an input becomes.
        when_to_use: A sentence or two for the docs.
        preset: Options that make the method what it is, `use_dora=True` for DoRA. A user cannot change them.
        defaults: Options that differ from PEFT's own defaults.
        required: Options without a default that could work, each with what to pass.
        derive: Options that depend on the model's shape, from the model (maybe on the meta device) and its config with
            the targets resolved; a user's options beat them.
        derive_from_data: Options that come from the training data, from the tokenizer and the token ids of one row.
        resolve_targets: Options that name modules, for model types that PEFT has no default for; empty when the model
            has no module of the kind, `None` where the choice is PEFT's all the same.
        hook_options: Options of the hooks below, which the PEFT config does not have, with their defaults.
        quantization: Makes the config that the base model is loaded with.
        model_config: Settings of the model's own config that the method needs.
        prepare: Changes how the wrapped model computes, where PEFT's way does not fit. Run once, for training and use.
        initialize: Sets the adapter's weights before the first step, from the model, a function that yields the given
            number of training batches, and the hook options. Not called when a run is resumed.
        restore: Prepares the model for the adapter saved in a directory: what `initialize` did to its shape.
        optimizer: Makes the optimizer from the model, the class that the user chose, its arguments and hook options.
        callback: Makes what acts during training, from the model; it sees `on_pre_optimizer_step`,
            `on_optimizer_step` and so on, with the model in `kwargs`.
        loss: The method's own loss where it is not the token mean: from the model, a micro-batch, the number $N$ of
            target tokens in the accumulated batch (`None` in evaluation) and the number of ranks; with the outputs.
        penalty: A scalar that is added to the loss of a whole accumulated batch once, and logged as `penalty`.
        virtual_tokens: Where the method puts virtual tokens and how many; `None` where it puts none into the sequence.
        training_state: What training goes on from and PEFT's adapter file leaves out; `None` where it leaves out none.
        saving_warnings: Regular expressions of what PEFT warns about when it saves the adapter, where that is expected.
        unsupported: What the method does not work with, and why; a run that asks for it is refused with this reason.
        requires: Packages needed beside ours: what to install, by the name that is imported.
        aliases: Further names.
        mixes_rows: Whether what a row is given depends on the others of its batch, and on their padding.
        mergeable: Whether the adapter can be folded into the base weights.

    Raises:
        ValueError: `config_class` is one of PEFT's soft prompts, and `virtual_tokens` is not set.
    """

    name: str
    family: MethodFamily
    summary: str
    paper: str
    config_class: type[PeftConfig] | None
    learning_rate: float
    learning_rate_source: str
    narrow_learning_rate: float | None = None
    equation: str = ""
    when_to_use: str = ""
    preset: Mapping[str, Any] = field(default_factory=dict, hash=False)
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    required: Mapping[str, str] = field(default_factory=dict, hash=False)
    derive: Callable[[PreTrainedModel, PeftConfig], Mapping[str, Any]] | None = None
    derive_from_data: Callable[[PreTrainedTokenizerBase, list[int]], Mapping[str, Any]] | None = None
    resolve_targets: Callable[[PreTrainedModel], Mapping[str, Any] | None] | None = None
    hook_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    quantization: Callable[[], Any] | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    prepare: Callable[[PeftModel], None] | None = None
    initialize: Callable[[PeftModel, Batches, Mapping[str, Any]], None] | None = None
    restore: Callable[[PeftModel, str], None] | None = None
    optimizer: (
        Callable[[PeftModel, type[torch.optim.Optimizer], Mapping[str, Any], Mapping[str, Any]], torch.optim.Optimizer]
        | None
    ) = None
    callback: Callable[[PeftModel], TrainerCallback | None] | None = None
    loss: Callable[[PeftModel, dict[str, Any], torch.Tensor | int | None, int], tuple[torch.Tensor, Any]] | None = None
    penalty: Callable[[PeftModel], torch.Tensor] | None = None
    virtual_tokens: VirtualTokens | None = None
    training_state: TrainingState | None = None
    saving_warnings: tuple[str, ...] = ()
    unsupported: Mapping[Feature, str] = field(default_factory=dict, hash=False)
    requires: Mapping[str, str] = field(default_factory=dict, hash=False)
    aliases: tuple[str, ...] = ()
    mixes_rows: bool = False
    mergeable: bool = False

    def __post_init__(self) -> None:
        is_soft_prompt = self.config_class is not None and issubclass(self.config_class, PromptLearningConfig)
        if is_soft_prompt and self.virtual_tokens is None:
            raise ValueError(
                f"The method {self.name!r} learns virtual tokens and does not say where they stand. Set "
                "virtual_tokens=BEFORE_INPUT or virtual_tokens=IN_DECODER_CACHE, from "
                "left_trainer.methods.virtual_tokens."
            )

    def supports(self, feature: Feature) -> bool:
        return feature not in self.unsupported

    @property
    def model_families(self) -> tuple[ModelFamily, ...]:
        """Families of models that the method works on."""
        return tuple(family for family in FAMILIES if self.supports(family))

    @property
    def only_wraps(self) -> bool:
        """Whether an adapter on the model is all that the method takes.

        Such a method also trains under a trainer that knows nothing of it. Others act on the base weights, the
        optimizer or the loss, or during training.
        """
        hooks = (self.prepare, self.initialize, self.optimizer, self.callback, self.loss, self.penalty)
        return self.config_class is not None and self.quantization is None and not any(hooks)

    def default_learning_rate(self, width: int | None) -> float:
        """The learning rate for a model whose hidden states have the size `width`, where the user sets none."""
        narrow = self.learning_rate if self.narrow_learning_rate is None else self.narrow_learning_rate
        return learning_rate_at(width, narrow, self.learning_rate)

    def positions(self, options: Mapping[str, Any], family: ModelFamily) -> Positions:
        """The positions that the method takes from those of the model.

        Args:
            options: The user's, as a mapping; the record's own are added.
            family: Of the model.
        """
        if self.virtual_tokens is None:
            return Positions()
        return self.virtual_tokens.positions({**self.defaults, **options, **self.preset}, family)
