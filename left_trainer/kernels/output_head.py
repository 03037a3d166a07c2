"""Stand in the place of a model's output head for one forward pass: to compute a loss there, or to see its input."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from left_trainer.kernels.fused_modules import has_torch_hooks
from left_trainer.kernels.linear_cross_entropy import TokenLoss, linear_cross_entropy
from left_trainer.kernels.linear_divergence import DistillationLoss, Head
from left_trainer.models.decoder_inputs import with_decoder_inputs
from left_trainer.models.wrapping import class_without_sharding

# Model types whose logits are those of `get_output_embeddings()`, plus `final_logits_bias` and soft-capped where the
# config says so, and whose loss is their cross-entropy. tests/parity/test_fast_paths.py trains each of them.
ENCODER_DECODER_TYPES = frozenset(
    (
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "led",
        "longt5",
        "m2m_100",
        "marian",
        "mbart",
        "mt5",
        "mvp",
        "nllb-moe",
        "pegasus",
        "pegasus_x",
        "plbart",
        "switch_transformers",
        "t5",
        "t5gemma",
        "umt5",
    )
)
DECODER_ONLY_TYPES = frozenset(
    ("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gptj", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3")
)


class CapturedLoss:
    """What the head computed in the last forward pass; `None` where the model was called without labels.

    `distilled` is known where a teacher's part is computed with the loss.
    """

    tokens: TokenLoss | None = None
    distilled: DistillationLoss | None = None


class CapturedInput:
    """What went into the head in the last forward pass; `None` where it was not called."""

    head: Head | None = None


def has_adapter(head: nn.Module | None) -> bool:
    """Whether an output head computes more than a product with its weight. `modules_to_save` replaces the weight."""
    return isinstance(head, (BaseTunerLayer, TrainableTokensWrapper))


def why_not_at_output_head(model: PreTrainedModel) -> str | None:
    """Why the loss of `model` may not be taken from the input of its output head; `None` where it may."""
    model_type, head = model.config.model_type, model.get_output_embeddings()
    if model_type not in ENCODER_DECODER_TYPES | DECODER_ONLY_TYPES:
        return f"the head of model type {model_type!r} is not known"
    if not class_without_sharding(model).__module__.startswith("transformers.models."):
        return f"{type(model).__name__} is not a class of transformers"
    if getattr(model.config.get_text_config(decoder=True), "output_router_logits", False):
        return "the model adds the loss of its routers"
    if has_adapter(head):
        return "the output head has an adapter"
    if class_without_sharding(head) is not nn.Linear:
        return f"the output head is a {type(head).__name__}, not torch's Linear"
    if head.weight.is_meta or (isinstance(head.weight, DTensor) and not _is_gathered_when_called(model)):
        return "the output head is sharded or offloaded"
    if _has_hooks(head):
        return "the output head has hooks"
    if any(module._compiled_call_impl is not None for module in (model, head)):
        return "the model is compiled"
    return None


def _has_hooks(head: nn.Module) -> bool:
    """Whether other hooks are on `head` than the one before and the one after its call that FSDP2 puts there."""
    if not isinstance(head, FSDPModule):
        return has_torch_hooks(head)
    backward = head._backward_hooks or head._backward_pre_hooks
    return bool(backward or max(len(head._forward_hooks), len(head._forward_pre_hooks)) > 1 or "forward" in vars(head))


def _is_gathered_when_called(model: nn.Module) -> bool:
    """Whether FSDP2 has the weights of a part of `model` whole on every process while that part runs."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextlib.contextmanager
def loss_at_output_head(
    model: PreTrainedModel,
    label_smoothing: float,
    workspace_bytes: int,
    distill: Callable[[Head, torch.Tensor], DistillationLoss] | None = None,
) -> Iterator[CapturedLoss]:
    """Inside, a call of `model` with labels returns the token mean as its loss, and logits for no row.

    The loss is computed inside of the model's forward pass, so that it is where a wrapper such as
    `DistributedDataParallel` or an autocast region expects it. Its gradient passes through the logits, by which FSDP2
    knows that the backward pass has come to the head, or begins.

    Args:
        model: The innermost model, one for which `why_not_at_output_head` is `None`.
        label_smoothing: As in `linear_cross_entropy`.
        workspace_bytes: The same.
        distill: Computes the loss with a teacher's part, from the head and the labels, in place of the above.
    """
    found, head = CapturedLoss(), model.get_output_embeddings()
    labels_of_call: list[torch.Tensor] = []
    head_forward = head.forward

    def loss_of(hidden: torch.Tensor) -> torch.Tensor:
        if not labels_of_call:
            return head_forward(hidden)  # type: ignore[no-any-return]
        labels, given = labels_of_call[0].to(hidden.device), _head(model, head, hidden)
        if not model.config.is_encoder_decoder:
            labels, given = labels[:, 1:], replace(given, hidden=hidden[:, :-1])
        if distill is not None:
            found.distilled = distill(given, labels)
            found.tokens, loss_sum = found.distilled.tokens, found.distilled.loss_sum
        else:
            found.tokens = linear_cross_entropy(
                given.hidden,
                given.weight,
                labels,
                given.bias,
                softcap=given.softcap,
                label_smoothing=label_smoothing,
                workspace_bytes=workspace_bytes,
            )
            loss_sum = found.tokens.loss_sum
        return loss_sum.to(hidden.dtype).expand(0, *hidden.shape[1:-1], head.out_features)

    def complete(outputs: Any) -> Any:
        if found.tokens is None:
            raise RuntimeError(f"{type(model).__name__} did not call its output head.")
        nothing = outputs["logits"].sum()
        if found.distilled is not None:
            found.distilled = found.distilled._replace(loss_sum=found.distilled.loss_sum + nothing)
        else:
            found.tokens = found.tokens._replace(loss_sum=found.tokens.loss_sum + nothing)
        distilled = found.distilled
        outputs["loss"] = distilled.loss_sum / found.tokens.n_tokens.clamp(min=1) if distilled else found.tokens.mean
        return outputs

    with _called_without_labels(model, labels_of_call, complete), _replaced(head, loss_of):
        yield found


@contextlib.contextmanager
def input_of_output_head(model: PreTrainedModel) -> Iterator[CapturedInput]:
    """Inside, a call of `model` notes what goes into its output head, and returns logits for no row and no loss.

    Args:
        model: The innermost model, one for which `why_not_at_output_head` is `None`. With labels its decoder reads what
            it would in training.
    """
    found, head = CapturedInput(), model.get_output_embeddings()

    def note(hidden: torch.Tensor) -> torch.Tensor:
        found.head = _head(model, head, hidden)
        return hidden.new_empty(0, *hidden.shape[1:-1], head.out_features)

    with _called_without_labels(model, [], lambda outputs: outputs), _replaced(head, note):
        yield found


def _head(model: PreTrainedModel, head: nn.Linear, hidden: torch.Tensor) -> Head:
    softcap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    return Head(hidden, head.weight, _bias(model, head), softcap)


@contextlib.contextmanager
def _called_without_labels(
    model: PreTrainedModel, labels_of_call: list[torch.Tensor], complete: Callable[[Any], Any]
) -> Iterator[None]:
    """Inside, `model` computes no loss of its own; a call's labels are noted, and shifted for a decoder."""
    model_forward = model.forward

    @functools.wraps(model_forward)
    def forward(*args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return model_forward(*args, **kwargs)
        kwargs["use_cache"] = False
        kwargs = with_decoder_inputs(model, {**kwargs, "labels": labels})
        del kwargs["labels"]
        labels_of_call.append(labels)
        try:
            outputs = model_forward(*args, **kwargs)
        finally:
            labels_of_call.clear()
        return complete(outputs)

    with _replaced(model, forward):
        yield


def _bias(model: PreTrainedModel, head: nn.Linear) -> torch.Tensor | None:
    """What is added to the logits, `(vocabulary,)`."""
    final: torch.Tensor | None = getattr(model, "final_logits_bias", None)
    if final is None or head.bias is None:
        return head.bias if final is None else final.flatten()
    return head.bias + final.flatten()


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `module` runs `forward`. A forward that was put on the instance before is put back."""
    before = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before  # type: ignore[method-assign]
