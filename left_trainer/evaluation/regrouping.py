"""Generating for many rows, of which those that go on are put together again and again.

A batch of `generate` takes as many steps as its longest text, and a step of few rows takes hardly less time than one of
many. Here a batch is left after `STAGE` steps. Its rows that have not ended wait for those of other batches that have
equally many new tokens, and go on with them as one batch. As all rows of a batch have equally many tokens, whatever
counts them, such as positions and minimum lengths, counts right.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import EosTokenCriteria, GenerationConfig, MaxLengthCriteria, PreTrainedModel
from transformers import generation as processors
from transformers.generation import GenerationMixin, GenerationMode

from left_trainer.adapters.task_ids import number_of_tasks
from left_trainer.evaluation.batches import MAX_WIDENING
from left_trainer.evaluation.decoded_rows import (
    DecodedRows,
    join_rows,
    reorder_copies,
    why_not_divisible,
    why_not_row_by_row,
)
from left_trainer.evaluation.prompt_reading import PromptReader
from left_trainer.evaluation.searches import BeamSearch, GreedySearch, Search, SearchSettings
from left_trainer.kernels.fast_paths import first_reason
from left_trainer.methods.apply import find_method

STAGE = 8  # steps after which a batch is left
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH)
# What they do to the scores of a row depends on its tokens and on nothing else of a batch.
READ_NOTHING = (
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
    processors.SuppressTokensLogitsProcessor,
)
READ_NEW_TOKENS = (
    *READ_NOTHING,
    processors.ExponentialDecayLengthPenalty,
    processors.ForcedBOSTokenLogitsProcessor,
    processors.ForcedEOSTokenLogitsProcessor,
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
    processors.NoBadWordsLogitsProcessor,
    processors.NoRepeatNGramLogitsProcessor,
    processors.RepetitionPenaltyLogitsProcessor,
    processors.SequenceBiasLogitsProcessor,
    processors.SuppressTokensAtBeginLogitsProcessor,
)


def why_not_with_adapter(model: PreTrainedModel | PeftModel) -> str | None:
    """Why the adapter of `model` needs each batch as `generate` was given it; `None` where it does not."""
    if not isinstance(model, PeftModel):
        return None
    method, config = find_method(model), model.active_peft_config
    has_encoder = model.get_base_model().config.is_encoder_decoder
    virtual = None if method is None else method.virtual_tokens
    return first_reason(
        {
            "the adapter is of no registered method": method is None,
            "the adapter needs task_ids": number_of_tasks(config),
            "the adapter counts from tokens of the prompt": getattr(config, "alora_invocation_tokens", None),
            # The padding of a prompt would come to stand before them.
            "the adapter puts virtual tokens before a prompt": virtual and not has_encoder and virtual.place != "input",
        }
    )


def why_not_regrouped(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Sequence[Any],
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> str | None:
    """Why the rows of different batches cannot go on together; `None` where that gives the same texts.

    Args:
        model: That generates, without an adapter's wrapper.
        input_ids: With which the decoder begins, `(rows * beams, tokens)`.
        logits_processor: As `generate` prepares them, like what follows.
        stopping_criteria: The same.
        generation_config: The same.
        model_kwargs: The same.
    """
    has_encoder = model.config.is_encoder_decoder
    known = READ_NEW_TOKENS if has_encoder else READ_NOTHING
    other = [type(one).__name__ for one in logits_processor if type(one) not in known]
    stops = [type(one).__name__ for one in stopping_criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)]
    prepares = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    reasons = {
        "another search than greedy or beam search": generation_config.get_generation_mode() not in MODES,
        "return_dict_in_generate=True": generation_config.return_dict_in_generate,
        "prefill_chunk_size is set": generation_config.prefill_chunk_size is not None,
        f"{type(model).__name__} prepares its inputs in its own way": prepares,
        f"{type(model).__name__} orders its cache in its own way": hasattr(model, "_reorder_cache"),
        "the decoder begins with several tokens": has_encoder and input_ids.shape[1] != 1,
    }
    read = [f"scores are changed by {name}" for name in other] + [f"{name} stops a text" for name in stops]
    return first_reason(reasons) or next(iter(read), None) or why_not_row_by_row(model, model_kwargs)


class Regrouping:
    """Rows of one evaluation: those that have not begun, those that wait to go on, and the texts of the others.

    Args:
        lengths: Tokens of each row's source, by its key.
        batch_size: Least number of rows of a batch, where there are as many.
        max_new_tokens: With `batch_size` of the longest sources, what may be held in memory at a time.
        pad_token_id: Fills what follows a text.
        reader: Of the prompts of a decoder-only model; `None` reads each as it is.
    """

    def __init__(
        self,
        lengths: dict[int, int],
        batch_size: int,
        max_new_tokens: int,
        pad_token_id: int,
        reader: PromptReader | None = None,
    ) -> None:
        self.lengths = lengths
        self.new_rows = deque(sorted(lengths, key=lambda key: (-lengths[key], key)))
        self.most_rows = MAX_WIDENING * batch_size
        self.most_tokens = batch_size * (max(lengths.values(), default=0) + max_new_tokens)
        self.pad_token_id = pad_token_id
        self.reader = reader
        self.waiting: dict[int, list[DecodedRows]] = {}
        self.texts: dict[int, np.ndarray] = {}

    def batches(self) -> Iterator[list[int]]:
        """Keys of the rows that begin together, the longest first, each batch to be generated for before the next."""
        while self.new_rows:
            room = self.most_tokens - self._waiting_tokens()
            width = self.lengths[self.new_rows[0]] + STAGE
            rows = max(1, min(room // width, self.most_rows, len(self.new_rows)))
            yield [self.new_rows.popleft() for _ in range(rows)]

    def decoding(self, keys: list[int]) -> Callable[..., torch.Tensor]:
        """What generates for a batch of `batches` in place of `generate`'s own loop, as its `custom_generate`."""

        # No bound method: with soft prompts PEFT makes a deep copy of the arguments, the rows that wait included.
        def decode(
            model: PreTrainedModel,
            input_ids: torch.Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: GenerationConfig,
            synced_gpus: bool = False,
            **model_kwargs: Any,
        ) -> torch.Tensor:
            prompt = input_ids.shape[1]
            search = self._search(logits_processor, stopping_criteria, generation_config, input_ids)
            rows = start(model, search, keys, input_ids, model_kwargs, self.reader)
            self._go_on(model, search, rows, STAGE - 1)
            while self.waiting and (not self.new_rows or self._is_full()):
                self._go_on(model, search, self._next_group(), STAGE)
            return input_ids[:, :prompt]

        return decode

    def _search(self, logits_processor: Any, criteria: Any, config: GenerationConfig, ids: torch.Tensor) -> Search:
        ends = [one.eos_token_id.to(ids.device) for one in criteria if isinstance(one, EosTokenCriteria)]
        settings = SearchSettings(
            config.max_length - ids.shape[1],
            torch.cat(ends) if ends else ids.new_empty(0),
            self.pad_token_id,
            logits_processor,
            config.num_beams,
            config.early_stopping,
            config.length_penalty,
        )
        return GreedySearch(settings) if settings.num_beams == 1 else BeamSearch(settings)

    def _go_on(self, model: PreTrainedModel, search: Search, rows: DecodedRows, steps: int) -> None:
        """Take steps with `rows`, note the texts that are done, and let the others wait."""
        is_done = search.is_done(rows.state, rows.new_tokens)
        for _ in range(steps):
            if is_done.all():
                break
            step(model, search, rows)
            is_done = search.is_done(rows.state, rows.new_tokens)
        texts = search.texts(rows.state)[is_done].cpu().numpy()
        done = [key for key, is_over in zip(rows.keys, is_done.tolist(), strict=True) if is_over]
        self.texts.update(zip(done, texts, strict=True))
        if len(done) < len(rows.keys):
            rows = rows.kept(~is_done) if done else rows
            self.waiting.setdefault(rows.new_tokens, []).append(rows)

    def _waiting_tokens(self) -> int:
        return sum(part.width * len(part.keys) for parts in self.waiting.values() for part in parts)

    def _is_full(self) -> bool:
        """Whether the rows that wait have to go on before others begin."""
        longest = max(sum(len(part.keys) for part in parts) for parts in self.waiting.values())
        return longest >= self.most_rows or 2 * self._waiting_tokens() > self.most_tokens

    def _next_group(self) -> DecodedRows:
        """Rows to go on with: the largest group, or at the end the one that is behind, which meets the others later."""

        def size(new_tokens: int) -> int:
            return sum(len(part.keys) for part in self.waiting[new_tokens])

        new_tokens = max(self.waiting, key=size) if self.new_rows else min(self.waiting)
        parts, rows, width = self.waiting[new_tokens], 0, 0
        taken: list[DecodedRows] = []
        while parts:
            rows, width = rows + len(parts[0].keys), max(width, parts[0].width)
            if taken and (rows > self.most_rows or rows * (width + STAGE) > self.most_tokens):
                break
            taken.append(parts.pop(0))
        if not parts:
            del self.waiting[new_tokens]
        return join_rows(taken)


def start(
    model: PreTrainedModel,
    search: Search,
    keys: list[int],
    input_ids: torch.Tensor,
    inputs: dict[str, Any],
    reader: PromptReader | None = None,
) -> DecodedRows:
    """Rows with their first new token."""
    arguments = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **inputs)
    inputs.pop("inputs_embeds", None)
    # What else the prompts of a decoder-only model would be read for is refused in `why_not_regrouped`.
    ids = input_ids if model.config.is_encoder_decoder else input_ids[:, :0]
    rows = DecodedRows(keys, search.settings.num_beams, 0, search.start(ids), inputs)
    outputs = reader.read(model, arguments, rows.copies) if reader else model(**arguments, return_dict=True)
    _choose(search, rows, outputs)
    return rows


def step(model: PreTrainedModel, search: Search, rows: DecodedRows) -> None:
    """Give each row another token."""
    ids = search.ids(rows.state)
    arguments = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **rows.inputs)
    _choose(search, rows, model(**arguments, return_dict=True))


def _choose(search: Search, rows: DecodedRows, outputs: Any) -> None:
    """Add the token that follows from `outputs` of the model."""
    rows.add_token(outputs)
    order = search.step(rows.state, rows.new_tokens, outputs.logits[:, -1].to(torch.float32, copy=True))
    if order is not None:
        reorder_copies(rows.inputs["past_key_values"], order)


def inspecting(found: list[str | None]) -> Callable[..., torch.Tensor]:
    """A `custom_generate` that generates nothing and adds to `found` why its rows cannot be regrouped."""

    def inspect_only(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> torch.Tensor:
        inputs.pop("synced_gpus", None)
        reason = why_not_regrouped(model, input_ids, logits_processor, stopping_criteria, generation_config, inputs)
        if reason is None:  # an adapter may put another cache in the place of the model's
            arguments = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **inputs)
            reason = why_not_divisible(model(**arguments, return_dict=True).past_key_values)
        found.append(reason)
        return input_ids

    return inspect_only
