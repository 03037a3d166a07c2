r"""The loss of both model families.

In a step with the micro-batches $b$ of all ranks and $N$ target tokens in all of them, the loss is

$$\frac{1}{N} \sum_b \sum_{i \in b} \ell_i + \sum_t \tau_t$$

where $\ell_i$ is what the first of these says: the user's `compute_loss_func`, the loss of the method's record, or the
negative log-likelihood of a token. The terms $\tau_t$ are added in training alone, and logged apart from the loss. A
teacher has a part in $\ell_i$, see `teaching`; what is logged as the loss stays the task's.
`checks.check_losses` refuses two losses that would replace each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from accelerate import Accelerator
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from left_trainer.kernels.fast_paths import LINEAR_CROSS_ENTROPY, FastPath, first_reason
from left_trainer.kernels.linear_divergence import DistillationLoss, Head
from left_trainer.kernels.output_head import CapturedLoss, has_adapter, loss_at_output_head, why_not_at_output_head
from left_trainer.methods import PeftMethod
from left_trainer.methods.hooks import LossTerm
from left_trainer.models import ModelFamily, unwrapped, without_adapter
from left_trainer.models.decoder_inputs import with_decoder_inputs
from left_trainer.token_mean import IGNORE_INDEX, accumulated_token_loss, share_of_tokens
from left_trainer.training_args import LeftTrainingArguments

Tokens: TypeAlias = torch.Tensor | int | None
# From the student's output head and the labels.
Distill: TypeAlias = Callable[[Head, torch.Tensor], DistillationLoss]


class AddedTerms:
    """What the terms added to the loss of micro-batches, apart from it."""

    def __init__(self) -> None:
        self._of_batch: dict[str, torch.Tensor] = {}
        self._added_to_batch: torch.Tensor | float = 0.0
        self._since_log: dict[str, torch.Tensor] = {}
        self._first_step = 0

    def add(self, name: str, value: torch.Tensor, added: torch.Tensor | None = None) -> None:
        """Note the value of a term in the current micro-batch.

        Args:
            name: That it is logged under.
            value: Its share of the accumulated batch's.
            added: What it has added to the loss, where that is not its value.
        """
        self._of_batch[name] = value.detach()
        self._added_to_batch += value.detach() if added is None else added.detach()

    def take_from(self, loss: torch.Tensor, step: int) -> torch.Tensor:
        """The loss of a micro-batch without what was added to it.

        Args:
            loss: With what was added.
            step: Number of optimizer steps that were made.
        """
        if not self._since_log:
            self._first_step = step
        for name, value in self._of_batch.items():
            self._since_log[name] = self._since_log.get(name, 0) + value
        loss = loss - self._added_to_batch
        self._of_batch.clear()
        self._added_to_batch = 0.0
        return loss

    def mean_since_log(self, step: int, accelerator: Accelerator) -> dict[str, float]:
        """The value of each term in a step, of all processes, since this was last asked for."""
        n_steps = max(1, step - self._first_step)
        means = {name: accelerator.reduce(value, "mean").item() / n_steps for name, value in self._since_log.items()}
        self._since_log.clear()
        return means


class LossWithTeacher(Protocol):
    """What computes the loss in training where a teacher is learned from."""

    @property
    def is_on(self) -> bool:
        """Whether a step needs the teacher."""

    def loss(
        self, host: LossHost, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Tokens
    ) -> tuple[torch.Tensor, Any]:
        """As `compute_loss`, with the outputs where there are any."""


class LossHost(Protocol):
    """What `compute_loss` needs of the trainer whose method it is."""

    args: LeftTrainingArguments
    model: nn.Module
    family: ModelFamily
    method: PeftMethod | None
    accelerator: Accelerator
    compute_loss_func: Callable[..., torch.Tensor] | None
    label_smoother: LabelSmoother | None
    loss_terms: Mapping[str, LossTerm]
    teaching: LossWithTeacher | None
    added_terms: AddedTerms
    fast_paths: dict[str, FastPath]
    only_loss_wanted: bool
    is_deepspeed_enabled: bool

    def parent_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Tokens
    ) -> Any:
        """The loss of Hugging Face's trainer."""

    def log_token_metrics(self, n_tokens: torch.Tensor, n_correct: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        """Note what a trainer logs beside the loss."""


def compute_loss(
    self: LossHost,
    model: nn.Module,
    inputs: dict[str, Any],
    return_outputs: bool = False,
    num_items_in_batch: Tokens = None,
) -> Any:
    """The share of a micro-batch in the loss of the accumulated batch, see the module's equation.

    Args:
        self: The trainer.
        model: With the wrappers for several devices.
        inputs: A batch; `labels`, `(batch, target)`, have -100 where nothing is predicted.
        return_outputs: Whether the outputs are wanted too.
        num_items_in_batch: Target tokens of the accumulated batch of all ranks; `None` outside of training, where the
            mean over the micro-batch is wanted.

    Returns:
        A scalar, with the model's outputs where they are wanted.
    """
    labels = inputs.get("labels")
    if self.compute_loss_func is not None:
        loss, outputs = _users_loss(self, model, inputs, num_items_in_batch)
    elif self.method is not None and self.method.loss is not None:
        self.fast_paths[LINEAR_CROSS_ENTROPY].record(_who_computes_the_loss(self))
        loss, outputs = _methods_loss(self.method, model, inputs, num_items_in_batch, loss_ranks(self))
    elif labels is None:
        result = self.parent_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
    elif self.teaching is not None and self.teaching.is_on and model.training:
        loss, outputs = self.teaching.loss(self, model, inputs, return_outputs, num_items_in_batch)
    else:
        loss, outputs = _token_mean(self, model, inputs, return_outputs, num_items_in_batch)
    if model.training and labels is not None:
        share = share_of_tokens(labels, num_items_in_batch, loss_ranks(self))
        for name, term in self.loss_terms.items():
            added = term(unwrapped(model), inputs, share)
            self.added_terms.add(name, added)
            loss = loss + added
    return (loss, outputs) if return_outputs else loss


def target_tokens(host: LossHost, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Number of tokens of a batch that its loss is the mean of, a scalar.

    A decoder-only model predicts the first token of a row only where virtual tokens stand before it.
    """
    if "shift_labels" in inputs:
        return inputs["shift_labels"].ne(IGNORE_INDEX).sum()  # type: ignore[no-any-return]
    labels = inputs["labels"]
    virtual = host.method.virtual_tokens if host.method else None
    if host.family == "decoder_only" and not (virtual and virtual.place == "input"):
        labels = labels[:, 1:]
    return labels.ne(IGNORE_INDEX).sum()  # type: ignore[no-any-return]


def loss_ranks(host: LossHost) -> int:
    """Number of ranks over which the target tokens of a step are summed."""
    return host.accelerator.num_processes if host.args.average_tokens_across_devices else 1


def _methods_loss(
    method: PeftMethod, model: nn.Module, inputs: dict[str, Any], num_items: Tokens, ranks: int
) -> tuple[torch.Tensor, Any]:
    """What the record's `loss` returns, checked."""
    assert method.loss is not None
    inputs, has_target = _with_some_target(inputs)
    result = method.loss(model, inputs, num_items, ranks)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"The loss of peft_method={method.name!r} returned a {type(result).__name__}. It must return a pair: the "
            "loss, a scalar tensor, and the model's outputs."
        )
    return result if num_items is None else (result[0] * has_target, result[1])


def _with_some_target(inputs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor | int]:
    """A batch that has a target, and 0 in place of 1 where it had none: it only fills up the last one of all processes.

    A mean over no target is undefined. What is computed of the batch is multiplied by 0.
    """
    labels = inputs.get("labels")
    if labels is None:
        return inputs, 1
    has_target = labels.ne(IGNORE_INDEX).any()
    return {**inputs, "labels": torch.where(has_target, labels, 0)}, has_target


def _who_computes_the_loss(host: LossHost) -> str | None:
    """In place of the token mean; `None` where it is that."""
    if host.compute_loss_func is not None:
        return "compute_loss_func computes the loss"
    if host.method is not None and host.method.loss is not None:
        return f"peft_method={host.method.name!r} computes the loss"
    return None


def why_not_linear_cross_entropy(host: LossHost, inputs: Mapping[str, Any], return_outputs: bool) -> str | None:
    """Why the loss of a batch is not taken at the output head; `None` where it may be, if the model allows it."""
    args = host.args
    reasons = {
        "use_linear_cross_entropy=False": not args.use_linear_cross_entropy,
        f"loss_type={args.loss_type!r}": args.loss_type != "nll",
        "the label smoother is not Hugging Face's": type(host.label_smoother) not in (type(None), LabelSmoother),
        "the logits are asked for": return_outputs and not host.only_loss_wanted,
        "the batch brings its own shifted labels": "shift_labels" in inputs,
        "use_liger_kernel=True": args.use_liger_kernel,
        "DeepSpeed shards the weights": host.is_deepspeed_enabled,
        "tensor, context or sequence parallelism": host.accelerator.parallelism_config is not None,
        "DataParallel runs several replicas": args.n_gpu > 1,
    }
    return _who_computes_the_loss(host) or first_reason(reasons)


def _users_loss(host: LossHost, model: nn.Module, inputs: dict[str, Any], num_items: Tokens) -> tuple[Any, Any]:
    """What `compute_loss_func` makes of outputs and labels, which have the same length for every method."""
    host.fast_paths[LINEAR_CROSS_ENTROPY].record(_who_computes_the_loss(host))
    assert host.compute_loss_func is not None
    labels = inputs.get("labels")
    outputs = outputs_with_logits(host, model, inputs)
    if num_items is not None:
        loss = host.compute_loss_func(outputs, labels, num_items_in_batch=num_items) * loss_ranks(host)
    else:  # the mean over this batch
        own = None if labels is None else target_tokens(host, inputs)
        loss = host.compute_loss_func(outputs, labels, num_items_in_batch=own)
    if labels is not None and host.family == "decoder_only":
        log_metrics_of_logits(host, outputs.logits, inputs)
    return loss, outputs


def outputs_with_logits(host: LossHost, model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Outputs of the model with logits for each label, `(batch, target, vocabulary)`.

    An encoder-decoder model is called with the labels too, because PEFT hands the decoder's input on for some methods
    only. Logits of virtual tokens, for which there are no labels, are cut off.
    """
    if host.family == "encoder_decoder":
        return model(**with_decoder_inputs(without_adapter(unwrapped(model)), inputs), use_cache=False)
    outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
    return _without_virtual_tokens(outputs, inputs)


def _without_virtual_tokens(outputs: Any, inputs: Mapping[str, Any]) -> Any:
    """Outputs of a decoder-only model whose logits have the length of its input."""
    n_virtual = outputs.logits.shape[1] - inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    if n_virtual > 0:
        outputs["logits"] = outputs.logits[:, n_virtual:]
    return outputs


def _token_mean(
    host: LossHost, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Tokens
) -> tuple[torch.Tensor, Any]:
    """Without logits where that is exact and they are not wanted, else from the model's own loss."""
    fast = at_output_head(host, model, inputs, return_outputs)
    if fast is not None:
        outputs, tokens = fast[0], fast[1].tokens
        assert tokens is not None
        loss = tokens.mean
        if num_items is not None:
            loss = tokens.loss_sum / torch.as_tensor(num_items).clamp(min=1) * loss_ranks(host)
        host.log_token_metrics(tokens.n_tokens, tokens.n_correct, inputs)
        return loss, outputs
    labels, smoother = inputs["labels"], host.label_smoother
    inputs, has_target = _with_some_target(inputs)
    if host.family == "encoder_decoder":
        outputs = outputs_with_logits(host, model, inputs)
        mean = outputs["loss"] if smoother is None else smoother(outputs, inputs["labels"])
        return accumulated_token_loss(mean, labels, num_items, loss_ranks(host)), outputs
    if smoother is not None or has_adapter(without_adapter(unwrapped(model)).get_output_embeddings()):
        # TRL's loss multiplies by the weight of the output head, and would not train the adapter on it.
        outputs = outputs_with_logits(host, model, inputs)
        log_metrics_of_logits(host, outputs.logits, inputs)
        smoother = smoother or LabelSmoother(epsilon=0.0)
        loss = smoother(outputs, inputs["labels"], shift_labels=True, num_items_in_batch=num_items)
        return loss if num_items is None else loss * has_target * loss_ranks(host), outputs
    if not {"attention_mask", "position_ids"} & set(inputs):  # TRL needs one of them to count tokens
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    # Outputs that nobody asked for would cost TRL a second forward pass.
    result = host.parent_loss(model, inputs, return_outputs, num_items)
    loss, outputs = (result[0], _without_virtual_tokens(result[1], inputs)) if return_outputs else (result, None)
    return loss if num_items is None else loss * has_target, outputs


def at_output_head(
    host: LossHost, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, distill: Distill | None = None
) -> tuple[Any, CapturedLoss] | None:
    """The model's outputs, whose logits have no rows, and the loss. `None` where the loss needs full logits."""
    base = without_adapter(unwrapped(model))
    reason = why_not_linear_cross_entropy(host, inputs, return_outputs) or why_not_at_output_head(base)
    outputs = captured = None
    if reason is None:
        smoothing, workspace_bytes = host.args.label_smoothing_factor, host.args.linear_cross_entropy_workspace_bytes
        with loss_at_output_head(base, smoothing, workspace_bytes, distill) as captured:
            outputs = model(**inputs, use_cache=False) if host.family == "decoder_only" else model(**inputs)
        reason = None if captured.tokens else f"{type(model).__name__} computes the loss"
    host.fast_paths[LINEAR_CROSS_ENTROPY].record(reason)
    return (outputs, captured) if captured and captured.tokens else None


def log_metrics_of_logits(host: LossHost, logits: torch.Tensor, inputs: Mapping[str, Any]) -> None:
    """Of a decoder-only model; the trainer of encoder-decoder models logs none, and the argmax takes time."""
    labels = inputs["labels"][:, 1:]
    is_target = labels.ne(IGNORE_INDEX)
    n_correct = (logits[:, :-1].detach().argmax(-1).eq(labels) & is_target).sum()
    host.log_token_metrics(is_target.sum(), n_correct, inputs)
