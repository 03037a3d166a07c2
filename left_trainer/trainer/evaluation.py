"""What an evaluation returns: a prediction for each row, in their order, the loss of a token, and scores."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput

from left_trainer.data.cut_rows import CutRows
from left_trainer.data.dataset_types import AnyDataset, as_dataset
from left_trainer.data.features import are_prompts, completion_texts, have_no_labels
from left_trainer.evaluation.batches import join_batches
from left_trainer.evaluation.generation import GenerationSpeed, adapter_disabled
from left_trainer.evaluation.text_metrics import TextPrediction
from left_trainer.evaluation.token_loss import TokenMeanLoss
from left_trainer.models import ModelFamily, unwrapped
from left_trainer.models.positions import Limits
from left_trainer.token_mean import IGNORE_INDEX
from left_trainer.trainer.batching import without_repeated_rows
from left_trainer.trainer.features import tell_cuts
from left_trainer.trainer.figures import ProcessFigures, figures_of_all
from left_trainer.trainer.generation import EvaluationHost, GenerationInEvaluation
from left_trainer.trainer.losses import target_tokens
from left_trainer.training_args import LeftTrainingArguments

EvalDatasets: TypeAlias = AnyDataset | dict[str, AnyDataset]


class GeneratingTrainer(Trainer):
    """A trainer that generates in evaluations, with `predict_with_generate`; what `LeftTrainer` builds on."""

    family: ClassVar[ModelFamily]
    args: LeftTrainingArguments
    processing_class: PreTrainedTokenizerBase
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None
    free_positions: Limits
    cut_rows: dict[str, CutRows]  # by split, of the rows that were counted
    figures: tuple[ProcessFigures, ...] = (ProcessFigures(),)  # of all processes, at the end of what ran last
    only_loss_wanted = False
    _generation: GenerationInEvaluation | None = None
    _loss: TokenMeanLoss | None = None  # of the evaluation that runs
    _rows: AnyDataset | None = None  # of the evaluation that runs, as the user gave them
    _are_prompts = _have_no_labels = False  # these rows
    _given_rows: Sequence[tuple[Any, AnyDataset]] = ()  # features of the constructor, and what they were made of

    @property
    def generation_speed(self) -> GenerationSpeed:
        """How fast the last evaluation or prediction generated."""
        return self._generation.speed if self._generation else GenerationSpeed()

    def _features(self, dataset: Any, tokenizer: Any, args: LeftTrainingArguments, split: str = "eval") -> Any:
        """`dataset` in the form that is evaluated: every row, in order. What is cut is noted under `split`."""
        return dataset

    def _features_to_evaluate(self, rows: AnyDataset, args: LeftTrainingArguments, split: str) -> Any:
        features = self._features(rows, self.processing_class, args, split)
        tell_cuts(self, split)
        return features

    def _remember_rows(self, given: EvalDatasets | None) -> None:
        """Note which rows of the user became the features of the constructor."""
        made = self.eval_dataset
        pairs = [(made[name], given[name]) for name in given] if isinstance(given, dict) else [(made, given)]
        self._given_rows = [pair for pair in pairs if pair[1] is not None]

    def evaluate(
        self,
        eval_dataset: EvalDatasets | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate; raw rows are tokenized as those given to the trainer. `gen_kwargs` go to `generate`.

        The loss is the mean over all target tokens, whatever the batches.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                part = name if eval_dataset is None else part
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}", **gen_kwargs)
            return metrics
        self._gen_kwargs = gen_kwargs
        named = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        given = next((rows for features, rows in self._given_rows if features is named), named)
        features = eval_dataset
        if given is named:  # not what the constructor was given
            given = as_dataset(named, "eval_dataset")
            features = self._features_to_evaluate(given, self.args, metric_key_prefix)
        with self._evaluating(given):
            return self._evaluating_parent().evaluate(features, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: AnyDataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """Predict; raw rows are tokenized as those given to the trainer. `gen_kwargs` go to `generate`.

        There is a prediction for each row, in the order of the rows. Rows may be prompts without a completion: then
        there are neither labels nor scores. With `num_return_sequences` the texts of a row follow each other, as from
        `Seq2SeqTrainer`, and the first of each is scored.
        """
        self._gen_kwargs = gen_kwargs
        given = as_dataset(test_dataset, "test_dataset")
        features = self._features_to_evaluate(given, self.args.replaced(eval_packing=False), metric_key_prefix)
        with self._evaluating(given):
            return self._evaluating_parent().predict(features, ignore_keys, metric_key_prefix)

    @contextlib.contextmanager
    def _evaluating(self, rows: AnyDataset | None) -> Iterator[None]:
        # Asked once, as it reads the first row of a stream.
        now = (rows, rows is not None and are_prompts(rows), rows is not None and have_no_labels(rows))
        before = self._rows, self._are_prompts, self._have_no_labels
        self._rows, self._are_prompts, self._have_no_labels = now
        try:
            yield
            self.figures = figures_of_all(self)
        finally:
            self._rows, self._are_prompts, self._have_no_labels = before

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
    ) -> tuple[torch.Tensor | None, Any, torch.Tensor | None]:
        """With `predict_with_generate`, generate greedily or by beam search.

        Returns:
            The loss; the generated token ids, `(batch, new tokens)`, a tuple of them with `num_return_sequences`; the
            labels, `(batch, target)`.
        """
        state = self.accelerator.gradient_state
        if self._loss is not None and state.end_of_dataloader:
            inputs = without_repeated_rows(self.args, inputs, state.remainder)
        inputs = self._prepare_inputs(inputs)
        if not self.args.predict_with_generate or prediction_loss_only:
            loss, outputs, labels = super().prediction_step(model, dict(inputs), prediction_loss_only, ignore_keys)
            self._note_loss(loss, inputs)
            return loss, outputs, None if self._are_prompts else labels
        if self._are_prompts or self._have_no_labels:
            inputs.pop("labels", None)  # which TRL's collator makes of the prompts
        labels = inputs.get("labels")
        generation = self._generation or GenerationInEvaluation(self, {})
        tokens, row_sums = generation.next_batch(inputs)
        if generation.sequences_per_row > 1:
            tokens = tokens.unflatten(0, (-1, generation.sequences_per_row)).unbind(1)
        if labels is None or not self.args.eval_loss_with_generation:
            return None, tokens, labels
        if row_sums is None:
            loss = super().prediction_step(model, dict(inputs), True, ignore_keys)[0]
        else:
            is_own = labels.ne(IGNORE_INDEX).any(dim=1)
            loss = row_sums[is_own].sum() / target_tokens(self, inputs).clamp(min=1)
        self._note_loss(loss, inputs)
        return loss, tokens, labels

    def _note_loss(self, loss: torch.Tensor | None, inputs: dict[str, Any]) -> None:
        if self._loss is not None and loss is not None and inputs.get("labels") is not None:
            self._loss.add(loss, target_tokens(self, inputs))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | int | None:
        # In an evaluation, Trainer would share the tokens of one batch among the processes, each of which has its own.
        return None if self._loss is not None else super()._get_num_items_in_batch(batch_samples, device)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `Trainer`, with the loss of a token; what is generated is kept on the host.

        `Trainer` asks for outputs with every loss; here it is known whether anyone reads them.
        """
        only_loss = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        generates = self.args.predict_with_generate and not only_loss
        loop = functools.partial(
            super().evaluation_loop, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        self.only_loss_wanted, self._loss = only_loss or generates, TokenMeanLoss()
        try:
            with self._without_router_losses():
                output = self._generating_loop(loop, dataloader) if generates else loop()
            name, loss = f"{metric_key_prefix}_loss", self._loss.value(self.args.logging_nan_inf_filter)
            if name in output.metrics and loss is not None:
                output.metrics[name] = loss
            elif not self._loss.is_empty:  # no row has a target
                output.metrics.pop(name, None)
            return output
        finally:
            self.only_loss_wanted, self._loss = False, None

    def _generating_loop(self, loop: Callable[[], EvalLoopOutput], dataloader: Any) -> EvalLoopOutput:
        self._generation = GenerationInEvaluation(self, getattr(self, "_gen_kwargs", {}))
        self._generation.start(dataloader)
        with results_on_host(self, self._references()) as finish:
            return finish(loop())

    def _references(self) -> list[str] | None:
        """The completions as the user wrote them, where the rows are read in their order."""
        in_order = type(self)._get_eval_sampler.__module__.startswith("left_trainer.")
        return completion_texts(self._rows) if in_order and self._rows is not None else None

    @contextlib.contextmanager
    def _without_router_losses(self) -> Iterator[None]:
        """Inside, a mixture of experts computes no loss for the balance of its routers.

        It is no part of the loss of a token, and transformers cannot compute it while the model generates.
        """
        config = unwrapped(self.model).config.get_text_config(decoder=True)
        switches = [(config, "output_router_logits"), (self, "aux_loss_enabled")]
        given = [(host, name, getattr(host, name)) for host, name in switches if getattr(host, name, False)]
        for host, name, _ in given:
            setattr(host, name, False)
        try:
            yield
        finally:
            for host, name, value in given:
                setattr(host, name, value)

    def _evaluating_parent(self) -> Any:
        """The class whose `evaluate` and `predict` do the work."""
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
def results_on_host(
    trainer: EvaluationHost, references: Sequence[str] | None = None
) -> Iterator[Callable[[EvalLoopOutput], EvalLoopOutput]]:
    """Inside, each batch's results go to the host; they are joined once, not again with every batch.

    `Trainer` joins them on the device (transformers 5.23). Yields what joins those that a loop returns.

    Args:
        trainer: That evaluates.
        references: What the metrics compare with, in the order of the rows.
    """
    args, compute_metrics = trainer.args, trainer.compute_metrics
    stays = not args.eval_do_concat_batches or args.batch_eval_metrics or trainer.preprocess_logits_for_metrics
    join = (lambda batches: batches) if stays else joined
    if compute_metrics is not None and not args.batch_eval_metrics:
        trainer.compute_metrics = lambda prediction: compute_metrics(
            TextPrediction(
                *map(join, (prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses)),
                references=references,
            )
        )
    on_host: dict[str, Any] = {} if stays else {"eval_do_concat_batches": False, "eval_accumulation_steps": 1}
    try:
        with trainer.with_arguments(**on_host):
            yield lambda output: output._replace(predictions=join(output.predictions), label_ids=join(output.label_ids))
    finally:
        trainer.compute_metrics = compute_metrics


def joined(batches: Any) -> Any:
    """The batches of an evaluation as one array; several sequences of a row follow each other."""
    if not isinstance(batches, list) or not isinstance(batches[0], tuple):
        return join_batches(batches)
    parts = [part for sequences in batches for part in sequences]
    longest = max(part.shape[1] for part in parts)
    wide = [[_widened(part, longest) for part in sequences] for sequences in batches]
    return np.concatenate([np.stack(sequences, axis=1).reshape(-1, longest) for sequences in wide])


def _widened(tokens: np.ndarray, longest: int) -> np.ndarray:
    return np.pad(tokens, ((0, 0), (0, longest - tokens.shape[1])), constant_values=IGNORE_INDEX)
