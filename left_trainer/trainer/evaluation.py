"""Generation in an evaluation: by length where that is exact, its results on the host."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput

from left_trainer.adapters.task_ids import TASK_IDS
from left_trainer.data.cut_rows import CutRows
from left_trainer.data.dataset_types import AnyDataset
from left_trainer.evaluation.batches import (
    batches_of_similar_length,
    join_batches,
    pad_rows,
    why_not_reordered,
    without_filling,
)
from left_trainer.evaluation.generation import (
    GenerationSpeed,
    adapter_disabled,
    generate_completions,
    generation_arguments,
    split_prompts,
)
from left_trainer.evaluation.row_losses import SOURCES, encode, row_losses, why_not_shared_encoder
from left_trainer.kernels.fast_paths import LINEAR_CROSS_ENTROPY, SHARED_ENCODER, SORTED_GENERATION, first_reason
from left_trainer.models import ModelFamily, unwrapped
from left_trainer.models.positions import Limits
from left_trainer.token_mean import IGNORE_INDEX, accumulated_token_loss
from left_trainer.trainer.features import evaluation_datasets, tell_cuts
from left_trainer.trainer.losses import LossHost, loss_ranks, why_not_linear_cross_entropy
from left_trainer.training_args import LeftTrainingArguments

# For each batch: new token ids `(batch, new tokens)`, and the loss summed over its target tokens where it is known.
EvalDatasets: TypeAlias = AnyDataset | dict[str, AnyDataset]
GeneratedBatches: TypeAlias = Iterator[tuple[torch.Tensor, torch.Tensor | None]]


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


class GenerationInEvaluation:
    """Generates for the rows of one evaluation.

    Args:
        trainer: That evaluates.
        given: Arguments for `generate`; those of the training arguments stand where none is given.
    """

    def __init__(self, trainer: EvaluationHost, given: dict[str, Any]) -> None:
        self.trainer = trainer
        self.speed = GenerationSpeed()
        args = trainer.args
        self.arguments: dict[str, Any] = {
            "synced_gpus": is_deepspeed_zero3_enabled() or is_fsdp_managed_module(trainer.model),
            **generation_arguments(args.generation_max_length, args.generation_num_beams, given),
        }
        self._batches: GeneratedBatches | None = None

    def start(self, dataloader: Any) -> None:
        """Before the rows of `dataloader` are read: lay out in which order to generate for them."""
        reason = self.why_not_by_length(dataloader)
        self.trainer.fast_paths[SORTED_GENERATION].record(reason)
        self._batches = None if reason else self._by_length(dataloader)

    def next_batch(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """For the next batch of the dataloader: new token ids `(batch, new tokens)`, loss sum where it is known."""
        return (self._generate(inputs), None) if self._batches is None else next(self._batches)

    def loss_of_batch(self, loss_sum: torch.Tensor, labels: torch.Tensor, count: Any) -> torch.Tensor:
        """The loss of a batch as `Trainer` averages it, from the sum over its target tokens."""
        mean = loss_sum / labels.ne(IGNORE_INDEX).sum().clamp(min=1)
        return accumulated_token_loss(mean, labels, count, loss_ranks(self.trainer))

    def why_not_by_length(self, dataloader: Any) -> str | None:
        """Why the rows are generated in the batches of `dataloader`; `None` where similar lengths go together."""
        config = unwrapped(self.trainer.model).generation_config
        arguments, family = self.arguments, self.trainer.family
        settings = {name: arguments.get(name, getattr(config, name)) for name in ("do_sample", "num_return_sequences")}
        reasons = {
            "sort_eval_by_length=False": not self.trainer.args.sort_eval_by_length,
            "the processes generate in step": arguments["synced_gpus"],
            "a generation_config is given": "generation_config" in arguments,
            "do_sample=True": settings["do_sample"],
            "num_return_sequences": (settings["num_return_sequences"] or 1) > 1,
            "max_length counts the padding of the prompts": (
                family == "decoder_only" and self._limit("max_length") and not self._limit("max_new_tokens")
            ),
        }
        return first_reason(reasons) or why_not_reordered(dataloader)

    def why_not_shared_encoder(self, row: dict[str, Any]) -> str | None:
        """Why the loss takes a forward pass of its own; `None` where it uses the encoder's output of generation."""
        if not type(self.trainer).compute_loss.__module__.startswith("left_trainer."):
            return "compute_loss is overridden"
        if not {*SOURCES, "labels"} >= set(row):
            return "the batch has further inputs"
        reason = why_not_linear_cross_entropy(self.trainer, row, return_outputs=False)
        return reason or why_not_shared_encoder(unwrapped(self.trainer.model))

    def _by_length(self, dataloader: Any) -> GeneratedBatches:
        """Generate for rows of similar length together, then yield the batches of `dataloader`."""
        trainer, dataset, order = self.trainer, dataloader.dataset, list(dataloader.batch_sampler)
        args = trainer.args
        rows = sorted({row for batch in order for row in batch})
        pad, ends = self._pad_and_end_ids()
        with_loss = self._shares_encoder(dataset[rows[0]])
        generated: dict[int, np.ndarray] = {}
        losses: dict[int, torch.Tensor] = {}
        batches = self._batches_by_length(dataset, rows, dataloader.batch_sampler.batch_size)
        hidden = args.disable_tqdm or not trainer.is_local_process_zero()
        for batch in tqdm(batches, desc="Generating", leave=False, disable=hidden):
            inputs = trainer._prepare_inputs(dataloader.collate_fn([dataset[row] for row in batch]))
            tokens = self._generate(inputs, keep_encoder_outputs=with_loss).cpu().numpy()
            generated.update((row, without_filling(ids, ends, pad)) for row, ids in zip(batch, tokens, strict=True))
            if with_loss:
                losses.update(zip(batch, self._row_losses(inputs).cpu(), strict=True))
        for batch in order:
            loss_sum = torch.stack([losses[row] for row in batch]).sum().to(args.device) if with_loss else None
            yield pad_rows([generated[row] for row in batch], pad, args.device), loss_sum

    def _shares_encoder(self, row: dict[str, Any]) -> bool:
        """Whether the loss is taken from the encoder's output of generation."""
        if not self.trainer.args.eval_loss_with_generation or "labels" not in row:
            return False
        reason = self.why_not_shared_encoder(row)
        self.trainer.fast_paths[SHARED_ENCODER].record(reason)
        return reason is None

    def _batches_by_length(self, dataset: Any, rows: list[int], batch_size: int) -> list[list[int]]:
        longest = int(self._limit("max_new_tokens") or self._limit("max_length") or 0)
        lengths, widths = [], []
        for features in map(dataset.__getitem__, rows):
            source = len(features["input_ids"])
            target = len(features.get("labels", ())) if self.trainer.family == "encoder_decoder" else 0
            lengths.append(source + target)
            widths.append(source + longest)
        batches = batches_of_similar_length(lengths, widths, batch_size)
        return [[rows[position] for position in batch] for batch in batches]

    def _limit(self, name: str) -> int | None:
        """`max_new_tokens` or `max_length` of the evaluation, else the model's own."""
        limits = ("max_new_tokens", "max_length")
        if any(self.arguments.get(limit) for limit in limits):
            return self.arguments.get(name)
        return getattr(unwrapped(self.trainer.model).generation_config, name)  # type: ignore[no-any-return]

    def _row_losses(self, inputs: dict[str, Any]) -> torch.Tensor:
        trainer = self.trainer
        trainer.fast_paths[LINEAR_CROSS_ENTROPY].record(None)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            return row_losses(
                unwrapped(trainer.model),
                inputs["encoder_outputs"],
                inputs,
                trainer.args.label_smoothing_factor,
                trainer.args.linear_cross_entropy_workspace_bytes,
            )

    def _pad_and_end_ids(self) -> tuple[int, list[int]]:
        """The id that fills generated rows, and those that end them."""
        config = unwrapped(self.trainer.model).generation_config
        ends = self.arguments.get("eos_token_id", config.eos_token_id)
        return self.trainer.processing_class.pad_token_id, [] if ends is None else np.atleast_1d(ends).tolist()

    def _generate(self, inputs: dict[str, Any], keep_encoder_outputs: bool = False) -> torch.Tensor:
        """New token ids, `(batch, new tokens)`, for a batch, to which the encoder's output may be added."""
        trainer, speed = self.trainer, self.speed.measure(len(inputs["input_ids"]))
        with torch.no_grad(), trainer.compute_loss_context_manager(), speed:
            model = unwrapped(trainer.model)
            if keep_encoder_outputs:
                inputs["encoder_outputs"] = encode(model, inputs)
            if trainer.family == "decoder_only":
                pad = trainer.processing_class.pad_token_id
                return generate_completions(model, split_prompts(inputs), pad, **self.arguments).contiguous()
            sources = {name: inputs[name] for name in (*SOURCES, TASK_IDS) if name in inputs}
            if "encoder_outputs" in inputs:  # a copy, because beam search repeats the rows in place
                sources["encoder_outputs"] = type(inputs["encoder_outputs"])(**inputs["encoder_outputs"])
            return model.generate(**sources, **self.arguments).contiguous()  # type: ignore[no-any-return]


class GeneratingTrainer(Trainer):
    """A trainer that generates in evaluations, with `predict_with_generate`; what `LeftTrainer` builds on."""

    family: ClassVar[ModelFamily]
    args: LeftTrainingArguments
    processing_class: PreTrainedTokenizerBase
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None
    free_positions: Limits
    cut_rows: dict[str, CutRows]  # by split, of the rows that were counted
    only_loss_wanted = False
    _generation: GenerationInEvaluation | None = None

    @property
    def generation_speed(self) -> GenerationSpeed:
        """How fast the last evaluation or prediction generated."""
        return self._generation.speed if self._generation else GenerationSpeed()

    def _features(self, dataset: Any, tokenizer: Any, args: LeftTrainingArguments, split: str) -> Any:
        """`dataset` in the form that the concrete trainer expects; what is cut of it is noted under `split`."""
        return dataset

    def _features_to_evaluate(self, dataset: Any, argument: str, split: str) -> Any:
        if dataset is None or isinstance(dataset, str):
            return dataset
        given = evaluation_datasets(dataset, argument)
        features = self._features(given, self.processing_class, self.args, split)
        tell_cuts(self, split)
        return features

    def evaluate(
        self,
        eval_dataset: EvalDatasets | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate; raw rows are tokenized as those given to the trainer. `gen_kwargs` go to `generate`."""
        self._gen_kwargs = gen_kwargs
        features = self._features_to_evaluate(eval_dataset, "eval_dataset", metric_key_prefix)
        return self._evaluating_parent().evaluate(features, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: AnyDataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """Predict; raw rows are tokenized as those given to the trainer. `gen_kwargs` go to `generate`."""
        self._gen_kwargs = gen_kwargs
        features = self._features_to_evaluate(test_dataset, "test_dataset", metric_key_prefix)
        return self._evaluating_parent().predict(features, ignore_keys, metric_key_prefix)

    def evaluate_loss(self, dataset: AnyDataset, metric_key_prefix: str = "eval") -> float:
        """The loss on `dataset` alone: nothing is generated, no metric is computed, nothing else is changed."""
        compute_metrics, self.compute_metrics = self.compute_metrics, None
        try:
            with self.with_arguments(predict_with_generate=False):
                return float(self.evaluate(dataset, metric_key_prefix=metric_key_prefix)[f"{metric_key_prefix}_loss"])
        finally:
            self.compute_metrics = compute_metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """With `predict_with_generate`, generate greedily or by beam search.

        Returns:
            The loss; the generated token ids, `(batch, new tokens)`; the labels, `(batch, target)`.
        """
        parent = self._evaluating_parent()
        if not self.args.predict_with_generate or prediction_loss_only:
            return parent.prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        generation = self._generation or GenerationInEvaluation(self, {})
        tokens, loss_sum = generation.next_batch(inputs)
        if labels is None or not self.args.eval_loss_with_generation:
            return None, tokens, labels
        if loss_sum is None:
            return parent.prediction_step(model, dict(inputs), True, ignore_keys)[0], tokens, labels
        count = self._get_num_items_in_batch([inputs], self.args.device)
        return generation.loss_of_batch(loss_sum, labels, count), tokens, labels

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in `Trainer`; what is generated is kept on the host, and generated by length where that is exact.

        `Trainer` asks for outputs with every loss; here it is known whether anyone reads them.
        """
        only_loss = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        generates = self.args.predict_with_generate and not only_loss
        loop = functools.partial(super().evaluation_loop, dataloader, description, prediction_loss_only)
        self.only_loss_wanted = only_loss or generates
        try:
            if not generates:
                return loop(*args, **kwargs)
            self._generation = GenerationInEvaluation(self, getattr(self, "_gen_kwargs", {}))
            self._generation.start(dataloader)
            with results_on_host(self) as finish:
                return finish(loop(*args, **kwargs))
        finally:
            self.only_loss_wanted = False

    def _evaluating_parent(self) -> Any:
        """The class whose `evaluate`, `predict` and `prediction_step` do the work."""
        return super()

    def without_adapter(self) -> contextlib.AbstractContextManager[None]:
        """Inside, `evaluate` and `predict` see the base model. Nothing changes where no adapter is (`full`)."""
        return adapter_disabled(unwrapped(self.model))

    @contextlib.contextmanager
    def with_arguments(self, **values: Any) -> Iterator[None]:
        """Inside, `args` is a copy with other values."""
        given, self.args = self.args, self.args.replaced(**values)
        try:
            yield
        finally:
            self.args = given


@contextlib.contextmanager
def results_on_host(trainer: EvaluationHost) -> Iterator[Callable[[EvalLoopOutput], EvalLoopOutput]]:
    """Inside, each batch's results go to the host; they are joined once, not again with every batch.

    `Trainer` joins them on the device (transformers 5.23). Yields what joins those that a loop returns.
    """
    args, compute_metrics = trainer.args, trainer.compute_metrics
    if not args.eval_do_concat_batches or args.batch_eval_metrics or trainer.preprocess_logits_for_metrics:
        yield lambda output: output
        return
    if compute_metrics is not None:
        trainer.compute_metrics = lambda prediction: compute_metrics(
            EvalPrediction(
                *(
                    join_batches(part)
                    for part in (prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses)
                )
            )
        )
    try:
        with trainer.with_arguments(eval_do_concat_batches=False, eval_accumulation_steps=1):
            yield lambda output: output._replace(
                predictions=join_batches(output.predictions), label_ids=join_batches(output.label_ids)
            )
    finally:
        trainer.compute_metrics = compute_metrics


def default_generation_length(model: Any, args: LeftTrainingArguments, default: int) -> int | None:
    """Limit on new tokens: the user's, else the model's own, which is left to it; `generate` would stop after 20."""
    generation = model.generation_config
    has_limit = generation.max_new_tokens is not None or generation.max_length is not None
    return args.generation_max_length or (None if has_limit else default)
