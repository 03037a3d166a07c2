"""Targets that a teacher writes once, and that its student trains on (Kim and Rush, 2016).

Prompts and answers are texts, so that teacher and student may have different tokenizers and be of different families.
Sequence-Level Knowledge Distillation, https://arxiv.org/abs/1606.07947.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from left_trainer.adapters.task_ids import task_inputs
from left_trainer.compression.teacher import Teacher
from left_trainer.compression.teacher_key import digest, teacher_key
from left_trainer.data.encoding import token_ids
from left_trainer.data.features import tokenize_sources, without_appended_end
from left_trainer.evaluation.batches import batches_of_similar_length
from left_trainer.evaluation.generation import (
    end_of_prompt,
    generate_completions,
    positions_for_text,
)
from left_trainer.evaluation.text_metrics import decode
from left_trainer.methods.apply import find_method
from left_trainer.models import without_adapter
from left_trainer.models.languages import generate_in_target_language
from left_trainer.models.positions import Limits, position_limits

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Writing:
    """How a teacher writes.

    Args:
        max_new_tokens: Length limit of an answer, in the teacher's tokens.
        num_beams: 1 is greedy.
        max_length: Longer prompts are cut; `None` where only the teacher's positions bound them.
        truncation_mode: `keep_start` or `keep_end` of what an encoder reads. A decoder-only teacher goes on from the
            end of its prompt, which is kept.
    """

    max_new_tokens: int
    num_beams: int = 1
    max_length: int | None = None
    truncation_mode: str = "keep_start"


class TargetWriter:
    """A teacher that answers prompts.

    Args:
        teacher: With a tokenizer.
        how: It writes.
        device: That it writes on.
    """

    def __init__(self, teacher: Teacher, how: Writing, device: torch.device) -> None:
        assert teacher.tokenizer is not None
        self.teacher, self.device = teacher, device
        base = without_adapter(teacher.model)
        self._is_encoder_decoder = bool(base.config.is_encoder_decoder)
        self.tokenizer = teacher.tokenizer if self._is_encoder_decoder else without_appended_end(teacher.tokenizer)
        if self._is_encoder_decoder:
            generate_in_target_language(base, self.tokenizer)
        self.limits = _limits(teacher)
        # Half of the positions of a decoder-only model are left to the prompt.
        most = self.limits.target if self._is_encoder_decoder else (self.limits.source or 0) // 2 or None
        self.how = Writing(**{**asdict(how), "max_new_tokens": min(how.max_new_tokens, most or how.max_new_tokens)})

    def key(self, ids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What the answers to prompts depend on, of which `encode` has made `ids`."""
        config = without_adapter(self.teacher.model).generation_config.to_dict()
        config.pop("transformers_version", None)
        generation = digest(json.loads(json.dumps(config, default=str)))
        teacher = teacher_key(self.teacher)
        return {"teacher": teacher, "prompts": digest(list(ids)), "generation": generation, **asdict(self.how)}

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt, cut to what the teacher can read."""
        how = self.how
        if self._is_encoder_decoder:
            limit = Limits(self.limits.source).at_most(how.max_length).source
            return tokenize_sources(list(map(str, prompts)), self.tokenizer, limit, how.truncation_mode)["input_ids"]  # type: ignore[no-any-return]
        ids = _prompt_ids(prompts, self.tokenizer)
        free = None if self.limits.source is None else max(1, self.limits.source - how.max_new_tokens)
        room = Limits(free).at_most(how.max_length).source
        if room is None:
            return ids
        return [end_of_prompt(torch.tensor(row), room, self.tokenizer.bos_token_id).tolist() for row in ids]

    def batches(self, ids: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
        """Positions of prompts of like length, the longest first."""
        lengths = [len(row) for row in ids]
        return batches_of_similar_length(lengths, [n + self.how.max_new_tokens for n in lengths], batch_size)

    def answer(self, ids: Sequence[list[int]]) -> list[str]:
        """The texts that the teacher writes, without spaces around them."""
        arguments = {
            "max_new_tokens": self.how.max_new_tokens,
            "num_beams": self.how.num_beams,
            "do_sample": False,
            "num_return_sequences": 1,
        }
        pad = self.tokenizer.pad_token_id
        with self.teacher.speaking(self.device) as model:
            if self._is_encoder_decoder:
                batch = self.tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt").to(self.device)
                tokens = model.generate(**batch, **task_inputs(model, len(ids)), **arguments)
            else:
                rows = [torch.tensor(row, device=self.device) for row in ids]
                tokens = generate_completions(
                    model, rows, self.tokenizer.eos_token_id if pad is None else pad, **arguments
                )
        return decode(self.tokenizer, tokens.cpu().numpy())


def _prompt_ids(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if all(isinstance(prompt, str) for prompt in prompts):
        return token_ids(tokenizer, list(map(str, prompts)))
    return [
        list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)) for prompt in prompts
    ]


def _limits(teacher: Teacher) -> Limits:
    """Positions that the teacher has for texts."""
    model: PreTrainedModel | PeftModel = teacher.model
    base = without_adapter(model)
    if not base.config.is_encoder_decoder:
        positions = positions_for_text(base if teacher.is_base else model)
        return Limits(positions, positions)
    method = find_method(model) if isinstance(model, PeftModel) and not teacher.is_base else None
    limits = position_limits(base.config)
    if method is None:
        return limits
    taken = method.positions(vars(model.active_peft_config), "encoder_decoder")
    return Limits(limits.source and limits.source - taken.source, limits.target and limits.target - taken.target)


def longest_answer(completions: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest completion of the data, its end included, in the tokens of a teacher."""
    texts = [content_of(completion).strip() for completion in completions]
    return max(map(len, token_ids(tokenizer, texts)), default=0) + 1


def content_of(completion: Any) -> str:
    """The text of a completion, plain or as chat messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion or ())


def with_targets(rows: Dataset, texts: Sequence[str]) -> tuple[Dataset, int]:
    """Rows with the teacher's answers in place of their completions, and how many keep their own.

    An answer begins with the space that parts the row's own completion from its prompt. A row to which the teacher has
    answered nothing keeps its own target, as nothing can be learned from an empty one.

    Args:
        rows: With `prompt` and `completion`, of text or of chat messages.
        texts: An answer to each.
    """
    own = rows["completion"]
    targets = [
        _in_place_of(completion, text) if text else completion for completion, text in zip(own, texts, strict=True)
    ]
    kind = rows.features["completion"]
    replaced = rows.remove_columns("completion").add_column("completion", targets, feature=kind)
    return replaced, sum(not text for text in texts)


def _in_place_of(completion: Any, text: str) -> Any:
    if not isinstance(completion, str):
        names = completion[-1]
        return [dict.fromkeys(names) | {"role": "assistant", "content": text}]
    return completion[: len(completion) - len(completion.lstrip())] + text
