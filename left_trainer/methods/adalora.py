"""AdaLoRA: low-rank updates whose ranks are reassigned during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from left_trainer.adapters.training_state import (
    TrainingState,
    collect_trained_parameters,
    part_of,
    prefixed,
    restore_trained_parameters,
)
from left_trainer.methods.inner_forward import call_inner_model
from left_trainer.methods.learning_rates import metamathqa
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.targets import query_value

SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # attributes of PEFT's RankAllocator, and parts of the training state
KEPT_RANKS = "kept_ranks"


class AdaLoraCallback(TrainerCallback):
    """Drives AdaLoRA's rank schedule from the run's own steps.

    Unless the user sets `tinit` and `tfinal`, ranks stay for the first tenth of the steps and for the last three.
    PEFT's own example calls `update_and_allocate` by hand; under a plain Trainer nobody does, and no rank ever changes.
    """

    def __init__(self, model: PeftModel) -> None:
        config = model.active_peft_config
        self.is_scheduled = bool(config.tinit or config.tfinal)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PeftModel, **_: Any
    ) -> None:
        config = model.active_peft_config
        config.total_step = state.max_steps
        if not self.is_scheduled:
            config.tinit, config.tfinal = state.max_steps // 10, state.max_steps * 3 // 10
        if config.total_step - config.tfinal - config.tinit < 2:
            raise ValueError(
                f"tinit={config.tinit} and tfinal={config.tfinal} leave too few of {config.total_step} steps between "
                "them to reassign ranks. Pass smaller ones in peft_kwargs, or train longer."
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PeftModel, **_: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)


def orthogonality_penalty(model: PeftModel) -> torch.Tensor:
    r"""AdaLoRA's regularizer: the weighted mean of $\lVert P^\top P - I \rVert$ and $\lVert Q Q^\top - I \rVert$."""
    distances = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            gram = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
            distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
    return model.active_peft_config.orth_reg_weight * torch.stack(distances).mean()


def collect_ranks(model: PeftModel) -> dict[str, torch.Tensor]:
    """All ranks, the importance scores that choose among them, and which are kept; PEFT saves the ranks kept only."""
    allocator = model.base_model.rankallocator
    pattern = model.active_peft_config.rank_pattern or {}
    return {
        **collect_trained_parameters(model),
        **{name: tensor for score in SCORES for name, tensor in prefixed(score, getattr(allocator, score)).items()},
        **prefixed(KEPT_RANKS, {name: torch.tensor(kept) for name, kept in pattern.items()}),
    }


def restore_ranks(model: PeftModel, state: Mapping[str, torch.Tensor]) -> None:
    """Put back what `collect_ranks` gave."""
    restore_trained_parameters(model, state)
    allocator = model.base_model.rankallocator
    device = {name: parameter.device for name, parameter in model.base_model.model.named_parameters()}
    for score in SCORES:
        setattr(allocator, score, {name: tensor.to(device[name]) for name, tensor in part_of(state, score).items()})
    kept = {name: mask.tolist() for name, mask in part_of(state, KEPT_RANKS).items()}
    model.active_peft_config.rank_pattern = kept or None


ADALORA = PeftMethod(
    name="adalora",
    family="reparameterization",
    summary="low-rank updates whose ranks are reassigned during training by importance",
    paper="Zhang et al., 2023, arXiv 2303.10512",
    config_class=AdaLoraConfig,
    narrow_learning_rate=9e-3,
    learning_rate=5e-4,
    learning_rate_source=metamathqa(1e-4, 37.3) + "; Zhang et al., 2023, tables 8 to 11, range 5e-4 to 2e-3",
    equation=r"W' = W + s P \Lambda Q, \quad P^\top P \approx Q Q^\top \approx I",
    when_to_use="A budget of ranks that should go where they matter. The schedule follows the run's own steps: "
    "ranks stay for the first tenth, are reassigned until seven tenths, and stay again.",
    defaults={"total_step": 1, "init_r": 12, "target_r": 8, "lora_alpha": 32},
    resolve_targets=query_value,
    prepare=call_inner_model,
    callback=AdaLoraCallback,
    penalty=orthogonality_penalty,
    training_state=TrainingState(collect_ranks, restore_ranks),
    saving_warnings=(".*have invalid shape",),  # of factors that are empty, because every rank was taken away
    unsupported={"shrinking": "it shares a budget of ranks among the layers that it starts with."},
    mergeable=True,
)
