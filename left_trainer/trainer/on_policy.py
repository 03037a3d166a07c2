"""Steps on texts that the student has written itself (Agarwal et al., 2023, https://arxiv.org/abs/2306.13649).

In such a step the student samples an answer to each prompt of the batch, at temperature 1 and without a gradient. These
answers take the place of the targets, and the teacher's divergence on them is the whole loss. Which steps they are, and
what is sampled in them, follows from the seed and the number of the step alone, so that a resumed run writes the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from random import Random
from typing import Any, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from left_trainer.evaluation.generation import NEUTRAL
from left_trainer.methods.apply import seeded
from left_trainer.models import unwrapped
from left_trainer.models.wrapping import evaluating
from left_trainer.token_mean import IGNORE_INDEX
from left_trainer.trainer.generation import EvaluationHost, GenerationInEvaluation
from left_trainer.trainer.losses import AddedTerms

ON_POLICY = "on_policy"  # the share of steps that is logged
# The student's own distribution, whatever its generation config says.
SAMPLING = {
    **{name: value for name, value in NEUTRAL.items() if value is not None},
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beams": 1,
    "num_return_sequences": 1,
}


class OnPolicyHost(EvaluationHost, Protocol):
    """What writing in a step needs of the trainer."""

    teaching: Any
    state: Any
    added_terms: AddedTerms

    def _without_router_losses(self) -> contextlib.AbstractContextManager[None]: ...


def is_on_policy(fraction: float, seed: int, step: int) -> bool:
    """Whether a step trains on the student's own texts: the same on all ranks, and in a run that is resumed.

    Args:
        fraction: Share of such steps.
        seed: Of the run.
        step: Number of the steps before it.
    """
    return Random(f"{seed} {step}").random() < fraction


def with_own_texts(trainer: OnPolicyHost, batches: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The micro-batches of a step with the student's own texts as targets; `None` in a step without them.

    Args:
        trainer: In the step.
        batches: What it would train on.
    """
    teaching, args = trainer.teaching, trainer.args
    if teaching is None or not teaching.options.on_policy_fraction:
        return None
    step = trainer.state.global_step
    teaching.on_policy = is_on_policy(teaching.options.on_policy_fraction, args.seed, step)
    share = torch.tensor(float(teaching.on_policy), device=args.device)
    trainer.added_terms.add(ON_POLICY, share, added=torch.zeros_like(share))
    if not teaching.on_policy:
        return None
    seed = Random(f"{args.seed} {step} {args.process_index}").getrandbits(63)
    model, generation = unwrapped(trainer.model), GenerationInEvaluation(trainer, SAMPLING)
    with seeded(seed), evaluating(model), trainer._without_router_losses():
        return [_with_own_text(trainer, generation, trainer._prepare_inputs(batch)) for batch in batches]


def _without_others(written: dict[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without targets in the rows that had none, which fill up the last batch of several processes."""
    has_target = inputs["labels"].ne(IGNORE_INDEX).any(dim=1, keepdim=True)
    return {**written, "labels": written["labels"].masked_fill(~has_target, IGNORE_INDEX)}


def _with_own_text(trainer: OnPolicyHost, generation: GenerationInEvaluation, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch with what the student has written for it in the place of the targets."""
    prompts = generation.prompts(inputs) if trainer.family == "decoder_only" else []
    tokens, _ = generation.next_batch(inputs)
    tokens, ends = tokens.to(inputs["input_ids"].device), generation.end_ids
    if trainer.family == "decoder_only":
        pad = trainer.processing_class.pad_token_id
        return _without_others(_continued(inputs, prompts, up_to_end(tokens, ends), pad), inputs)
    labels = up_to_end(tokens[:, 1:], ends)
    written = tokens[:, :-1].masked_fill(labels.eq(IGNORE_INDEX), trainer.processing_class.pad_token_id)
    of_targets = ("labels", "decoder_input_ids", "decoder_attention_mask")
    kept = {name: value for name, value in inputs.items() if name not in of_targets}
    # Beside the labels, of which mBART would make another beginning: a target of its own ends with the language.
    return _without_others({**kept, "labels": labels, "decoder_input_ids": written}, inputs)


def up_to_end(tokens: torch.Tensor, end_ids: list[int]) -> torch.Tensor:
    """Sampled ids `(batch, sequence)` up to the first end of a text, which is kept, and -100 behind it."""
    is_end = torch.isin(tokens, tokens.new_tensor(end_ids)).long()
    return tokens.masked_fill((is_end.cumsum(1) - is_end).bool(), IGNORE_INDEX)


def _continued(
    inputs: Mapping[str, Any], prompts: list[torch.Tensor], answers: torch.Tensor, pad_token_id: int
) -> dict[str, Any]:
    """A batch of a decoder-only model: each prompt with its answer, which alone is a target, filled up on the right."""
    is_written = answers.ne(IGNORE_INDEX)
    pairs = [(prompt, answer[own]) for prompt, answer, own in zip(prompts, answers, is_written, strict=True)]
    ids = [torch.cat(pair) for pair in pairs]
    labels = [torch.cat([torch.full_like(prompt, IGNORE_INDEX), answer]) for prompt, answer in pairs]
    shape = inputs["input_ids"].shape
    of_rows = {name: value for name, value in inputs.items() if getattr(value, "shape", ())[:2] != shape}
    return {
        **of_rows,
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }
