"""Let a trainer take the loss from the input of the output head, where that is exact."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from left_trainer.kernels.fast_paths import LINEAR_CROSS_ENTROPY, FastPath, first_reason
from left_trainer.kernels.linear_cross_entropy import TokenLoss
from left_trainer.kernels.output_head import loss_from_head, unsupported
from left_trainer.models import unwrapped, without_adapter
from left_trainer.training_args import LeftTrainingArguments


class HeadLossMixin(Trainer):
    """`linear_cross_entropy` for a trainer, and full logits wherever something needs them."""

    args: LeftTrainingArguments
    _only_loss_wanted = False

    @functools.cached_property
    def fast_paths(self) -> dict[str, FastPath]:
        """What ran and what fell back, by name; `training_report.json` shows it."""
        return defaultdict(FastPath)

    @property
    def loss_ranks(self) -> int:
        """Number of ranks over which the target tokens of a step are summed."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def note_full_logits(self, reason: str) -> None:
        """Count a loss that is taken elsewhere, for the report."""
        self.fast_paths[LINEAR_CROSS_ENTROPY].record(reason)

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in `Trainer`, which asks for outputs with every loss; here it is known whether anyone reads them."""
        only_loss = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        self._only_loss_wanted = only_loss or self.args.predict_with_generate
        try:
            return super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs)
        finally:
            self._only_loss_wanted = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The token mean over the accumulated batch, without logits where that is exact and as before elsewhere."""
        fast = None
        if "labels" in inputs:
            fast = self._forward_without_logits(model, {**inputs, "use_cache": False}, return_outputs)
        if fast is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs, tokens = fast
        loss = tokens.mean
        if num_items_in_batch is not None:
            loss = tokens.loss_sum / torch.as_tensor(num_items_in_batch).clamp(min=1) * self.loss_ranks
        if hasattr(self, "_total_train_tokens"):
            self._record_token_metrics(tokens, inputs)
        return (loss, outputs) if return_outputs else loss

    def outputs_and_token_mean(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool
    ) -> tuple[Any, torch.Tensor]:
        """Outputs of an encoder-decoder model, with logits where `return_outputs` needs them, and its loss."""
        fast = self._forward_without_logits(model, inputs, return_outputs)
        if fast is not None:
            return fast[0], fast[1].mean
        outputs = model(**inputs)
        smoother = self.label_smoother
        return outputs, outputs["loss"] if smoother is None else smoother(outputs, inputs["labels"])

    def _forward_without_logits(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool
    ) -> tuple[Any, TokenLoss] | None:
        """The model's outputs, whose logits have no rows, and the loss. `None` where the loss needs full logits."""
        base = without_adapter(unwrapped(model))
        reason = self._why_full_logits(inputs, return_outputs) or unsupported(base)
        outputs = tokens = None
        if reason is None:
            workspace_bytes = self.args.linear_cross_entropy_workspace_bytes
            with loss_from_head(base, self.args.label_smoothing_factor, workspace_bytes) as head:
                outputs = model(**inputs)
            tokens = head.tokens
            reason = None if tokens else f"{type(model).__name__} computes the loss"
        self.fast_paths[LINEAR_CROSS_ENTROPY].record(reason)
        return (outputs, tokens) if tokens else None

    def _why_full_logits(self, inputs: dict[str, Any], return_outputs: bool) -> str | None:
        args = self.args
        reasons = {
            "use_linear_cross_entropy=False": not args.use_linear_cross_entropy,
            "compute_loss_func computes the loss": self.compute_loss_func is not None,
            f"loss_type={args.loss_type!r}": args.loss_type != "nll",
            "the label smoother is not Hugging Face's": type(self.label_smoother) not in (type(None), LabelSmoother),
            "the logits are asked for": return_outputs and not self._only_loss_wanted,
            "the batch brings its own shifted labels": "shift_labels" in inputs,
            "use_liger_kernel=True": args.use_liger_kernel,
            "torch_compile=True": args.torch_compile,
            "DeepSpeed shards the weights": self.is_deepspeed_enabled,
            "FSDP shards the weights": self.is_fsdp_enabled,
            "tensor, context or sequence parallelism": self.accelerator.parallelism_config is not None,
            "DataParallel runs several replicas": args.n_gpu > 1,
        }
        return first_reason(reasons)

    def _record_token_metrics(self, tokens: TokenLoss, inputs: dict[str, Any]) -> None:
        """What `SFTTrainer` logs beside the loss, but for the entropy, which costs another pass over the logits."""
        mode = "train" if self.model.training else "eval"
        mask = inputs.get("attention_mask")
        n_inputs = tokens.n_tokens.new_tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
        counts = torch.stack((tokens.n_tokens, tokens.n_correct, n_inputs)).unsqueeze(0)
        n_tokens, n_correct, n_positions = self.accelerator.gather_for_metrics(counts).sum(0).tolist()
        self._metrics[mode]["mean_token_accuracy"].append(n_correct / n_tokens if n_tokens else 0.0)
        if mode == "train":
            self._total_train_tokens += n_positions
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
