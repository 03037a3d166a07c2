"""Generation in an evaluation: with which arguments, in which order, from which inputs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, Seq2SeqTrainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalPrediction

from left_trainer.adapters.task_ids import TASK_IDS
from left_trainer.evaluation.batches import batches_of_similar_length, pad_rows, why_not_reordered, without_filling
from left_trainer.evaluation.generation import (
    OF_THE_USER,
    GenerationSpeed,
    generate_completions,
    generated_ids,
    generation_arguments,
    generation_setting,
    reads_whole_prompts,
    room_for_prompt,
    split_prompts,
    why_not_batched,
    why_rows_are_mixed,
)
from left_trainer.evaluation.prompt_reading import PromptReader
from left_trainer.evaluation.regrouping import Regrouping, inspecting, why_not_with_adapter
from left_trainer.evaluation.row_losses import SOURCES, encode, row_losses, why_not_shared_encoder
from left_trainer.kernels.fast_paths import (
    LINEAR_CROSS_ENTROPY,
    REGROUPED_GENERATION,
    SHARED_ENCODER,
    SHARED_PROMPT_PREFIX,
    SORTED_GENERATION,
    first_reason,
)
from left_trainer.models import unwrapped, without_adapter
from left_trainer.trainer.losses import LossHost, why_not_linear_cross_entropy

# For each batch: new token ids `(batch, new tokens)`, and the loss of each row summed over its target tokens, where it
# is known.
GeneratedBatches: TypeAlias = Iterator[tuple[torch.Tensor, torch.Tensor | None]]
# Arguments that `generate` leaves out where a loop of ours takes the place of its own.
OF_ITS_LOOP = ("tokenizer", "assistant_model", "assistant_tokenizer", "streamer")
OWN_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


class EvaluationHost(LossHost, Protocol):
    """What generation needs of the trainer that evaluates."""

    processing_class: PreTrainedTokenizerBase
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None
    preprocess_logits_for_metrics: Callable[..., Any] | None
    compute_loss: Callable[..., Any]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]: ...

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager[None]: ...

    def is_local_process_zero(self) -> bool: ...

    def with_arguments(self, **values: Any) -> contextlib.AbstractContextManager[None]: ...


def completed_generation_config(model: Any, given: GenerationConfig | str | Path | None) -> GenerationConfig | None:
    """`args.generation_config` as `Seq2SeqTrainer` reads it; token ids that it does not name are those of `model`."""
    if given is None:
        return None
    own, config = model.generation_config, Seq2SeqTrainer.load_generation_config(given)
    for name in OWN_TOKEN_IDS:
        if getattr(config, name) is None:
            setattr(config, name, getattr(own, name))
    return config


def use_generation_config(model: Any, config: GenerationConfig | None) -> None:
    """Let `model` generate by `config`, with its adapter and without."""
    if config is not None:
        model.generation_config = without_adapter(model).generation_config = config


class GenerationInEvaluation:
    """Generates for the rows of one evaluation.

    Args:
        trainer: That evaluates.
        given: Arguments for `generate`; those of the training arguments stand where none is given.
    """

    def __init__(self, trainer: EvaluationHost, given: dict[str, Any]) -> None:
        self.trainer = trainer
        self.speed = GenerationSpeed()
        args, self.model = trainer.args, unwrapped(trainer.model)
        self.arguments: dict[str, Any] = {
            "synced_gpus": is_deepspeed_zero3_enabled() or isinstance(trainer.model, FSDPModule),
            **generation_arguments(self.model, args.generation_max_length, args.generation_num_beams, given),
        }
        self._batches: GeneratedBatches | None = None

    def start(self, dataloader: Any) -> None:
        """Before the rows of `dataloader` are read: lay out in which order to generate for them."""
        reason = self.why_not_by_length(dataloader)
        self.trainer.fast_paths[SORTED_GENERATION].record(reason)
        self._batches = None if reason else self._by_length(dataloader)

    def next_batch(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """For the next batch of the dataloader: new token ids, and sums of losses by row where they are known.

        Token ids are `(batch, new tokens)`; with `num_return_sequences` those of a row follow each other.
        """
        return (self._generate(inputs), None) if self._batches is None else next(self._batches)

    @property
    def sequences_per_row(self) -> int:
        """How many texts are generated for each row."""
        return int(self._setting("num_return_sequences") or 1)

    @property
    def end_ids(self) -> list[int]:
        """The ids that end a text."""
        ends = self._setting("eos_token_id")
        return [] if ends is None else np.atleast_1d(ends).tolist()

    def why_not_by_length(self, dataloader: Any) -> str | None:
        """Why the rows are generated in the batches of `dataloader`; `None` where similar lengths go together."""
        given = first_reason({f"a {name} is given": name in self.arguments for name in OF_THE_USER})
        reasons = {
            "sort_eval_by_length=False": not self.trainer.args.sort_eval_by_length,
            "the processes generate in step": self.arguments["synced_gpus"],
            "do_sample=True": self._setting("do_sample"),
            "num_return_sequences": self.sequences_per_row > 1,
        }
        return first_reason(reasons) or given or why_rows_are_mixed(self.model) or why_not_reordered(dataloader)

    def why_not_shared_encoder(self, row: dict[str, Any]) -> str | None:
        """Why the loss takes a forward pass of its own; `None` where it uses the encoder's output of generation."""
        if not type(self.trainer).compute_loss.__module__.startswith("left_trainer."):
            return "compute_loss is overridden"
        if not {*SOURCES, "labels"} >= set(row):
            return "the batch has further inputs"
        reason = why_not_linear_cross_entropy(self.trainer, row, return_outputs=False)
        return reason or why_not_shared_encoder(self.model)

    def _setting(self, name: str) -> Any:
        return generation_setting(self.model, self.arguments, name)

    def _by_length(self, dataloader: Any) -> GeneratedBatches:
        """Generate for rows of similar length together, then yield the batches of `dataloader`."""
        trainer, dataset, order = self.trainer, dataloader.dataset, list(dataloader.batch_sampler)
        args = trainer.args
        rows = sorted({row for batch in order for row in batch})
        pad, ends = self._pad_and_end_ids()
        with_loss = self._shares_encoder(dataset[rows[0]])
        regrouping = self._regrouping(dataloader, rows)
        generated: dict[int, np.ndarray] = {}
        losses: dict[int, torch.Tensor] = {}
        if regrouping:
            batches: Iterable[list[int]] = regrouping.batches()
        else:
            batches = self._batches_by_length(dataset, rows, dataloader.batch_sampler.batch_size)
        hidden = args.disable_tqdm or not trainer.is_local_process_zero()
        with tqdm(total=len(rows), desc="Generating", leave=False, disable=hidden) as bar:
            for batch in batches:
                inputs = trainer._prepare_inputs(dataloader.collate_fn([dataset[row] for row in batch]))
                decoding = {"custom_generate": regrouping.decoding(batch)} if regrouping else {}
                tokens = self._generate(inputs, keep_encoder_outputs=with_loss, **decoding).cpu().numpy()
                texts = regrouping.texts if regrouping else dict(zip(batch, tokens, strict=True))
                generated.update((row, without_filling(ids, ends, pad)) for row, ids in texts.items())
                texts.clear()
                if with_loss:
                    losses.update(zip(batch, self._row_losses(inputs).cpu(), strict=True))
                bar.update(len(batch))
        for batch in order:
            sums = torch.stack([losses[row] for row in batch]).to(args.device) if with_loss else None
            yield pad_rows([generated[row] for row in batch], pad, args.device), sums

    def _regrouping(self, dataloader: Any, rows: list[int]) -> Regrouping | None:
        """What regroups the rows that go on, where that gives the same texts."""
        lengths = {row: len(dataloader.dataset[row]["input_ids"]) for row in rows}
        reason = self._why_not_regrouped(dataloader, lengths)
        fast_paths = self.trainer.fast_paths
        fast_paths[REGROUPED_GENERATION].record(reason)
        reader = PromptReader(fast_paths[SHARED_PROMPT_PREFIX]) if self.trainer.family == "decoder_only" else None
        if reader and reason:
            reader.path.record(reason)
        if reason:
            return None
        pad, _ = self._pad_and_end_ids()
        return Regrouping(lengths, dataloader.batch_sampler.batch_size, self._longest_text(), pad, reader)

    def _why_not_regrouped(self, dataloader: Any, lengths: dict[int, int]) -> str | None:
        """Asked of `generate` itself, which prepares the first row and generates nothing for it."""
        if not self.trainer.args.regroup_generation:
            return "regroup_generation=False"
        given = first_reason({f"a {name} is given": name in self.arguments for name in OF_ITS_LOOP})
        reason = given or why_not_with_adapter(self.model)
        if self.trainer.family == "decoder_only":
            reason = reason or why_not_batched(self.model, max(lengths.values()) + self._longest_text())
            reason = reason or reads_whole_prompts(self.model, self.arguments)
        if reason:
            return reason
        found: list[str | None] = []
        inputs = self.trainer._prepare_inputs(dataloader.collate_fn([dataloader.dataset[next(iter(lengths))]]))
        self._generate(inputs, custom_generate=inspecting(found))
        return found[0]

    def _longest_text(self) -> int:
        return int(self._setting("max_new_tokens") or self._setting("max_length") or 0)

    def _shares_encoder(self, row: dict[str, Any]) -> bool:
        """Whether the loss is taken from the encoder's output of generation."""
        if not self.trainer.args.eval_loss_with_generation or "labels" not in row:
            return False
        reason = self.why_not_shared_encoder(row)
        self.trainer.fast_paths[SHARED_ENCODER].record(reason)
        return reason is None

    def _batches_by_length(self, dataset: Any, rows: list[int], batch_size: int) -> list[list[int]]:
        longest = self._longest_text()
        lengths, widths = [], []
        for features in map(dataset.__getitem__, rows):
            source = len(features["input_ids"])
            target = len(features.get("labels", ())) if self.trainer.family == "encoder_decoder" else 0
            lengths.append(source + target)
            widths.append(source + longest)
        batches = batches_of_similar_length(lengths, widths, batch_size)
        return [[rows[position] for position in batch] for batch in batches]

    def _row_losses(self, inputs: dict[str, Any]) -> torch.Tensor:
        trainer = self.trainer
        trainer.fast_paths[LINEAR_CROSS_ENTROPY].record(None)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            return row_losses(
                self.model,
                inputs["encoder_outputs"],
                inputs,
                trainer.args.label_smoothing_factor,
                trainer.args.linear_cross_entropy_workspace_bytes,
            )

    def _pad_and_end_ids(self) -> tuple[int, list[int]]:
        """The id that fills generated rows, and those that end them."""
        given = self.arguments.get("pad_token_id")
        return self.trainer.processing_class.pad_token_id if given is None else given, self.end_ids

    def _generate(self, inputs: dict[str, Any], keep_encoder_outputs: bool = False, **further: Any) -> torch.Tensor:
        """New token ids, `(batch, new tokens)`, for a batch, to which the encoder's output may be added.

        `further` goes to `generate`, beside the arguments of the evaluation.
        """
        trainer, speed = self.trainer, self.speed.measure(len(inputs["input_ids"]))
        with torch.no_grad(), trainer.compute_loss_context_manager(), speed:
            if keep_encoder_outputs:
                inputs["encoder_outputs"] = encode(self.model, inputs)
            if trainer.family == "decoder_only":
                return self._continue_prompts(inputs, **further)
            sources = self._generation_inputs(inputs)
            if "encoder_outputs" in inputs:  # a copy, because beam search repeats the rows in place
                sources["encoder_outputs"] = type(inputs["encoder_outputs"])(**inputs["encoder_outputs"])
            return generated_ids(self.model.generate(**sources, **self.arguments, **further)).contiguous()

    def _continue_prompts(self, inputs: dict[str, Any], **further: Any) -> torch.Tensor:
        """`_generate` for a decoder-only model."""
        arguments = {**self.arguments, "pad_token_id": self._pad_and_end_ids()[0], **further}
        return generate_completions(self.model, self.prompts(inputs), **arguments).contiguous()

    def prompts(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The prompts of a batch of a decoder-only model, with room for the new tokens among its positions."""
        room = room_for_prompt(self.model, self._setting("max_new_tokens"))
        return split_prompts(inputs, room, self.trainer.processing_class.bos_token_id)

    def _generation_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What of a batch an encoder-decoder model generates from: all that its forward takes but the targets.

        What is as long as the labels was made of them, and would be continued.
        """
        targets, labels = {"labels"}, inputs.get("labels")
        decoder_ids = inputs.get("decoder_input_ids")
        if labels is not None and decoder_ids is not None and decoder_ids.shape == labels.shape:
            targets |= {"decoder_input_ids", "decoder_attention_mask"}
        taken = {*inspect.signature(without_adapter(self.model).forward).parameters, TASK_IDS} - targets
        return {name: value for name, value in inputs.items() if name in taken and name != "encoder_outputs"}
