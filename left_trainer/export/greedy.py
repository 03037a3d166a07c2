"""Greedy answers of the trained model, which an export is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from left_trainer.evaluation.generation import DEFAULT_MAX_NEW_TOKENS, generate_completions
from left_trainer.models import without_adapter
from left_trainer.runs.inference import Generator


@dataclass(frozen=True)
class GreedySearch:
    """The search that every runtime repeats: the most probable token, and nothing else that a config may ask for.

    Beams, penalties and sampling belong to the runtime that serves the model; what is compared is what was exported.

    Args:
        max_new_tokens: Most tokens of an answer.
        start: What the decoder starts with, forced tokens such as a language included; empty for decoder-only models.
        ends: Ids that end an answer.
        never: Ids that are never written: padding, and what the model's config forbids.
    """

    max_new_tokens: int
    start: tuple[int, ...]
    ends: tuple[int, ...]
    never: tuple[int, ...]

    @classmethod
    def of(cls, config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, is_encoder_decoder: bool) -> GreedySearch:
        """The search for a model that the run generates with `config` for."""
        ends = _ids(config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id)
        forbidden = [ids[0] for ids in config.bad_words_ids or () if len(ids) == 1]
        never = {*forbidden, *_ids(config.suppress_tokens), *_ids(tokenizer.pad_token_id)} - {*ends}
        first = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
        start = (*_ids(first), *_ids(config.forced_bos_token_id)) if is_encoder_decoder else ()
        limit = config.max_new_tokens or config.max_length or DEFAULT_MAX_NEW_TOKENS
        return cls(limit, start, ends, tuple(sorted(never)))

    def answer(self, tokens: Iterable[int]) -> list[int]:
        """Of generated tokens those of the answer: without the start, up to the end."""
        ids = list(tokens)
        ids = ids[len(self.start) :] if tuple(ids[: len(self.start)]) == self.start else ids
        stop = next((index for index, token in enumerate(ids) if token in self.ends), len(ids))
        return ids[: min(stop, self.max_new_tokens)]


class Reference:
    """What the trained model itself answers.

    Args:
        generator: With the trained model.
        prompts: Whole prompts.
        max_new_tokens: By default that of the run.
    """

    def __init__(self, generator: Generator, prompts: Sequence[str], max_new_tokens: int | None = None) -> None:
        self.generator, self.prompts, self.tokenizer = generator, list(prompts), generator.tokenizer
        self.is_encoder_decoder = generator.family == "encoder_decoder"
        search = GreedySearch.of(generator.generation_config, self.tokenizer, self.is_encoder_decoder)
        self.search = GreedySearch(max_new_tokens or search.max_new_tokens, search.start, search.ends, search.never)
        self.inputs: list[list[int]] = [list(ids) for ids in generator.features(self.prompts)["input_ids"]]
        self.answers = hugging_face_answers(generator.model, self)

    def texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """Answers as the run decodes them."""
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    @torch.no_grad()
    def gap(self, row: int, answer: Sequence[int]) -> float:
        """How much less probable the model finds the first token of `answer` that is not its own, in nats."""
        own = [*self.answers[row], self.search.ends[0] if self.search.ends else -1]
        other = [*answer, own[-1]]
        first = next((index for index, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), None)
        if first is None:
            return 0.0
        model, text = self.generator.model, [*self.search.start, *own[:first]]
        ids = torch.tensor([self.inputs[row]], device=model.device)
        if self.is_encoder_decoder:
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([text], device=model.device)).logits
        else:
            logits = model(input_ids=torch.cat([ids, torch.tensor([text], device=ids.device).long()], dim=1)).logits
        scores = logits[0, -1].float().log_softmax(-1)
        return float(scores[own[first]] - scores[other[first]]) if other[first] < len(scores) else float("inf")


@torch.no_grad()
def hugging_face_answers(model: Any, reference: Reference) -> list[list[int]]:
    """Answers of a model of transformers, with or without an adapter, to the prompts of `reference`.

    Args:
        model: Loaded, in evaluation mode.
        reference: With the prompts and the search.
    """
    search, tokenizer = reference.search, reference.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else search.ends[0]
    base = without_adapter(model)
    before, base.generation_config = base.generation_config, GenerationConfig()  # whose settings `generate` would add
    settings = {
        "max_new_tokens": search.max_new_tokens,
        "num_beams": 1,
        "do_sample": False,
        "eos_token_id": list(search.ends) or None,
        "suppress_tokens": list(search.never) or None,
        "decoder_start_token_id": search.start[0] if search.start else None,
        "forced_bos_token_id": search.start[1] if len(search.start) > 1 else None,
    }
    try:
        answers = [search.answer(row) for row in _generate(model, reference, settings, pad)]
    finally:
        base.generation_config = before
    return answers


def _generate(model: Any, reference: Reference, settings: dict[str, Any], pad: int) -> list[list[int]]:
    device, size = reference.generator.model.device, 16
    rows: list[list[int]] = []
    for start in range(0, len(reference.inputs), size):
        batch = [torch.tensor(ids, device=device) for ids in reference.inputs[start : start + size]]
        if reference.is_encoder_decoder:
            padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=pad)
            lengths = torch.tensor([len(ids) for ids in batch], device=device)
            mask = (torch.arange(padded.shape[1], device=device) < lengths[:, None]).long()
            tokens = model.generate(input_ids=padded, attention_mask=mask, pad_token_id=pad, **settings)
        else:
            tokens = generate_completions(model, batch, pad, **settings)
        rows += tokens.tolist()
    return rows


def _ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)
