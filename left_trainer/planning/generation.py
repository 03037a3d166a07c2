"""Memory of generation: the prompt, then a step with a full key/value cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from left_trainer.evaluation.generation import DEFAULT_MAX_NEW_TOKENS
from left_trainer.models import without_adapter
from left_trainer.planning.rehearsal import BatchShape
from left_trainer.recording.recorder import StepRecorder
from left_trainer.training_args import LeftTrainingArguments


@torch.no_grad()
def record_generation(model: nn.Module, recorder: StepRecorder, batch: BatchShape, args: LeftTrainingArguments) -> None:
    """Run what generation for the longest batch needs most memory for.

    Args:
        model: With its method.
        recorder: Entered.
        batch: Of training, whose sources are as long as those of an evaluation.
        args: Rows, beams and new tokens.
    """
    base: Any = without_adapter(model)  # adapters in its layers stay
    model.eval()
    recorder.begin("evaluation")
    rows, beams = args.per_device_eval_batch_size, args.generation_num_beams or 1
    new_tokens = args.generation_max_length or DEFAULT_MAX_NEW_TOKENS
    if base.config.is_encoder_decoder:
        outputs = _encoder_decoder_prompt(base, rows, beams, batch.source)
        length = new_tokens
    else:
        prompt = _ones(rows * beams, max(batch.source, 1))
        mask = _ones(*prompt.shape)
        outputs = base(
            input_ids=prompt, attention_mask=mask, use_cache=True, logits_to_keep=1, **_positions(base, mask)
        )
        length = prompt.shape[1] + new_tokens
    cache = outputs.past_key_values
    _fill(cache, length - 1)
    recorder.mark("full cache")
    step = {"past_key_values": cache, "use_cache": True}
    if base.config.is_encoder_decoder:
        step.update(decoder_input_ids=_ones(rows * beams, 1), encoder_outputs=(outputs.encoder_last_hidden_state,))
    else:
        new = _ones(rows * beams, 1)
        step.update(input_ids=new, attention_mask=_ones(rows * beams, length), **_positions(base, new))
    del outputs
    scores = base(**step).logits[:, -1].float().log_softmax(-1)
    if beams > 1:
        order = torch.zeros(rows * beams, dtype=torch.int64, device=scores.device)
        cache.reorder_cache(order)
    recorder.mark("generated")


def _encoder_decoder_prompt(base: Any, rows: int, beams: int, source: int) -> Any:
    hidden = base.get_encoder()(input_ids=_ones(rows, source), attention_mask=_ones(rows, source))[0]
    if beams > 1:
        hidden = hidden.repeat_interleave(beams, 0)
    return base(
        encoder_outputs=(hidden,),
        attention_mask=_ones(rows * beams, source),
        decoder_input_ids=_ones(rows * beams, 1),
        use_cache=True,
    )


def _positions(base: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each row its own, as `generate` passes them: rows are padded on the left."""
    return {"position_ids": tokens} if "position_ids" in inspect.signature(base.forward).parameters else {}


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.int64, device="meta")


def _fill(cache: Any, length: int) -> None:
    """Keys and values of the text so far, `(rows, heads, length, width)`; those of cross-attention stay."""
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in cache.layers:
        for name in ("keys", "values"):
            tensor = getattr(layer, name)
            setattr(layer, name, tensor.new_empty(*tensor.shape[:2], length, tensor.shape[-1]))
