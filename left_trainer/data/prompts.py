"""From two texts to a prompt and its completion, cut to what a model can read."""

from __future__ import annotations

import functools
import sys
import unicodedata
from dataclasses import dataclass
from typing import Any

from datasets import Features, Value
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from left_trainer.data.dataset_types import AnyDataset
from left_trainer.data.lengths import CUTS
from left_trainer.data.mapping import Columns, add_columns
from left_trainer.models.positions import position_limits
from left_trainer.models.source import ModelSource
from left_trainer.tasks import Task

SPECIAL_TOKENS = 4  # room for what a tokenizer adds around prompt and completion
MIN_SOURCE_TOKENS = 8
MARGIN_TOKENS = 8
PROMPTS = Features({**dict.fromkeys(("prompt", "completion"), Value("string")), **dict.fromkeys(CUTS, Value("bool"))})


@dataclass(frozen=True)
class PromptFormat:
    """The template of prompts, and how long one may be.

    A source that is too long is cut at its end, so that the words of the prompt after it survive.

    Args:
        template: With `{source}`.
        tokenizer: Of the model.
        limit: Most tokens of a prompt together with those that a call reserves.
    """

    template: str
    tokenizer: PreTrainedTokenizerBase
    limit: int

    @functools.cached_property
    def overhead(self) -> int:
        """Tokens of a prompt beside its source."""
        return len(self.tokenizer(self.template.format(source=""))["input_ids"]) + SPECIAL_TOKENS

    def fit(self, source: str, reserved: int = 0) -> str:
        """`source`, cut so that its prompt and `reserved` further tokens keep the limit.

        Raises:
            ValueError: There is no room for a source.
        """
        used = self.overhead + reserved
        if self.limit - used < MIN_SOURCE_TOKENS:
            raise ValueError(
                f"Prompt and target take {used} tokens and max_length is {self.limit}, which leaves no room for the "
                "source. Raise max_length, or remove rows with such long targets."
            )
        return cut_to_tokens(source, self.tokenizer, self.limit - used)

    def source_of(self, prompt: str) -> str | None:
        """The source of a prompt that was made with the template; `None` for any other text."""
        before, _, after = self.template.format(source="\0").partition("\0")
        if not (prompt.startswith(before) and prompt.endswith(after) and len(prompt) >= len(before) + len(after)):
            return None
        return prompt[len(before) : len(prompt) - len(after)]


def room_for_answers(limit: int, max_new_tokens: int) -> int:
    """Tokens of `limit` that are kept free for what a decoder-only model generates: never more than half of them.

    Where a prompt is cut must not depend on the reference, which `generate` does not know.
    """
    return min(max_new_tokens, limit // 2)


def to_prompts(
    rows: AnyDataset,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelSource,
    max_length: int | None,
    prompt: str | None = None,
    reserved: int = 0,
    max_new_tokens: int = 0,
) -> AnyDataset:
    """Rows with `source` and `target` to rows that also have `prompt` and `completion`.

    A source that is too long is cut at its end, so that the words of the prompt after it, and the completion, survive.
    A target is cut where it would leave no room for a source. The columns `CUTS` say what of a row was cut.

    Args:
        rows: From `load_task_data`.
        task: Gives the prompt.
        tokenizer: Of the model.
        source: The model; its number of positions bounds the length.
        max_length: Further bound in tokens: prompt and completion together for decoder-only models, the prompt for
            encoder-decoder models.
        prompt: Template that replaces the task's.
        reserved: Positions of the sequence, or of the encoder, that the method takes.
        max_new_tokens: That will be generated for each row; a decoder-only model's prompt leaves room for them.

    Raises:
        ValueError: A prompt that leaves no room for a source.
    """
    shares_room = source.family == "decoder_only"
    limit = length_limit(source.config, tokenizer, max_length, reserved)
    prompts = PromptFormat(prompt or task.prompt, tokenizer, limit)
    answer, room = room_for_answers(limit, max_new_tokens), limit - prompts.overhead

    def cut(text: str, target: str) -> tuple[str, str]:
        used = 0
        if shares_room:
            target = cut_to_tokens(target, tokenizer, room - MIN_SOURCE_TOKENS)
            used = max(len(tokenizer(target, add_special_tokens=False)["input_ids"]), answer)
        return prompts.fit(text, used), target

    def render(batch: Columns) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {name: [] for name in ("prompt", "completion", *CUTS)}
        for text, target in zip(batch["source"], batch["target"], strict=True):
            used = max(most_tokens(target), answer) if shares_room else 0
            surely_fits = most_tokens(text) + used <= room
            kept_text, kept_target = (text, target) if surely_fits else cut(text, target)
            row = task.render(kept_text, kept_target, prompts.template)
            row_cuts = (kept_text != text, kept_target != target)
            for name, value in zip(made, (row["prompt"], row["completion"], *row_cuts), strict=True):
                made[name].append(value)
        return made

    return add_columns(rows, render, ("source", "target"), PROMPTS, desc="Prompts")


def most_tokens(text: str) -> int:
    """A number of tokens that no tokenizer exceeds on `text`: one for each byte, with room for what is added.

    A normalizer may mark capitals or take letters and accents apart. What it does to compatibility forms, some of which
    stand for a whole phrase, has no such bound.
    """
    if text.isascii():
        return 2 * len(text) + MARGIN_TOKENS
    return 4 * len(text.encode()) + MARGIN_TOKENS if unicodedata.is_normalized("NFKC", text) else sys.maxsize


def length_limit(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, max_length: int | None, reserved: int = 0
) -> int:
    """The smallest of the bounds that model (less `reserved` positions), tokenizer and user set, in tokens."""
    positions = model_positions(config, reserved)
    return min(bound for bound in (max_length, positions, tokenizer.model_max_length) if bound)


def model_positions(config: PreTrainedConfig, reserved: int = 0) -> int | None:
    """Positions of the encoder or the whole model, less `reserved` ones; `None` where their number is not bounded."""
    positions = position_limits(config, with_rotary=True).source
    return positions - reserved if positions else None


def cut_to_tokens(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """The longest start of `text` of at most `max_tokens` tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return text if len(ids) <= max_tokens else tokenizer.decode(ids[:max_tokens], skip_special_tokens=True)
