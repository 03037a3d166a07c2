"""Evaluation of a trainer: raw rows, generation, the model without its adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput, has_length

from left_trainer.data.features import AnyDataset
from left_trainer.evaluation.batches import (
    batches_of_like_length,
    join_batches,
    pad_rows,
    why_rows_stay_in_order,
    without_filling,
)
from left_trainer.evaluation.generation import GenerationSpeed, adapter_disabled, generation_arguments
from left_trainer.evaluation.row_losses import SOURCES, encode, row_losses, why_encoder_runs_twice
from left_trainer.kernels.fast_paths import LINEAR_CROSS_ENTROPY, SHARED_ENCODER, SORTED_GENERATION, FastPath
from left_trainer.loss import IGNORE_INDEX, accumulated_token_loss
from left_trainer.models import ModelFamily
from left_trainer.task_ids import TASK_IDS
from left_trainer.training_args import LeftTrainingArguments

EvalDatasets: TypeAlias = AnyDataset | dict[str, AnyDataset]


class EvaluationMixin(Trainer):
    """`evaluate` and `predict` of `LeftTrainer`."""

    args: LeftTrainingArguments
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None
    generation_speed: GenerationSpeed
    family: ClassVar[ModelFamily]
    fast_paths: dict[str, FastPath]
    _generated: Iterator[tuple[torch.Tensor, torch.Tensor | None]] | None = None
    _order_shows = False

    def _features(self, dataset: Any, tokenizer: Any, args: LeftTrainingArguments) -> Any:
        """`dataset` in the form that the concrete trainer expects."""
        return dataset

    def evaluate(
        self,
        eval_dataset: EvalDatasets | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate; raw rows are tokenized as those given to the trainer. `gen_kwargs` go to `generate`."""
        self._gen_kwargs = self._generation_arguments(gen_kwargs)
        features = self._features(eval_dataset, self.processing_class, self.args)
        return self._evaluating_parent().evaluate(features, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: AnyDataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """Predict; raw rows are tokenized as those given to the trainer. `gen_kwargs` go to `generate`."""
        self._gen_kwargs = self._generation_arguments(gen_kwargs)
        features = self._features(test_dataset, self.processing_class, self.args)
        return self._evaluating_parent().predict(features, ignore_keys, metric_key_prefix)

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
        tokens, loss_sum = (self._generate_batch(inputs), None) if self._generated is None else next(self._generated)
        if labels is None or not self.args.eval_loss_with_generation:
            return None, tokens, labels
        if loss_sum is None:
            return parent.prediction_step(model, dict(inputs), True, ignore_keys)[0], tokens, labels
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        mean = loss_sum / labels.ne(IGNORE_INDEX).sum().clamp(min=1)
        count = self._get_num_items_in_batch([inputs], self.args.device)
        return accumulated_token_loss(mean, labels, count, ranks), tokens, labels

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As in `Trainer`, with the rows in their order."""
        self._order_shows, before = True, self._order_shows
        try:
            return super().get_test_dataloader(test_dataset)
        finally:
            self._order_shows = before

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        # `train_sampling_strategy` shuffles evaluation too (transformers 5.23), which may be seen in what comes out.
        if self._order_shows or self.args.predict_with_generate or self.compute_metrics:
            return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None
        return super()._get_eval_sampler(eval_dataset)

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in `Trainer`; what is generated is kept on the host, and generated by length where that is exact."""
        only_loss = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        if only_loss or not self.args.predict_with_generate:
            return super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs)
        reason = self._why_generate_in_order(dataloader)
        self.fast_paths[SORTED_GENERATION].record(reason)
        self._generated = None if reason else self._generate_by_length(dataloader)
        try:
            with self._results_on_host() as finish:
                return finish(super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs))
        finally:
            self._generated = None

    @contextlib.contextmanager
    def _results_on_host(self) -> Iterator[Callable[[EvalLoopOutput], EvalLoopOutput]]:
        """Inside, each batch's results go to the host; they are joined once, not again with every batch.

        `Trainer` joins them on the device (transformers 5.23). Yields what joins those that a loop returns.
        """
        args, compute_metrics = self.args, self.compute_metrics
        given = args.eval_do_concat_batches, args.eval_accumulation_steps
        if not args.eval_do_concat_batches or args.batch_eval_metrics or self.preprocess_logits_for_metrics:
            yield lambda output: output
            return
        args.eval_do_concat_batches, args.eval_accumulation_steps = False, 1
        if compute_metrics is not None:
            self.compute_metrics = lambda prediction: compute_metrics(
                EvalPrediction(
                    *(
                        join_batches(part)
                        for part in (prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses)
                    )
                )
            )
        try:
            yield lambda output: output._replace(
                predictions=join_batches(output.predictions), label_ids=join_batches(output.label_ids)
            )
        finally:
            args.eval_do_concat_batches, args.eval_accumulation_steps = given
            self.compute_metrics = compute_metrics

    def _why_generate_in_order(self, dataloader: Any) -> str | None:
        """Why the rows are generated in the batches of `dataloader`; `None` where those of like length go together."""
        config = self.accelerator.unwrap_model(self.model).generation_config
        arguments = self._batch_generation_arguments()
        settings = {name: arguments.get(name, getattr(config, name)) for name in ("do_sample", "num_return_sequences")}
        reasons = {
            "sort_eval_by_length=False": not self.args.sort_eval_by_length,
            "the processes generate in step": arguments["synced_gpus"],
            "a generation_config is given": "generation_config" in arguments,
            "do_sample=True": settings["do_sample"],
            "num_return_sequences": (settings["num_return_sequences"] or 1) > 1,
            "max_length counts the padding of the prompts": self.family == "decoder_only" and "max_length" in arguments,
        }
        asked = next((reason for reason, holds in reasons.items() if holds), None)
        return asked or why_rows_stay_in_order(dataloader)

    def _why_encode_twice(self, row: dict[str, Any]) -> str | None:
        """Why the loss takes a forward pass of its own; `None` where it uses the encoder's output of generation."""
        if not type(self).compute_loss.__module__.startswith("left_trainer."):
            return "compute_loss is overridden"
        if not {*SOURCES, "labels"} >= set(row):
            return "the batch has further inputs"
        full_logits = self._why_full_logits(row, return_outputs=False)  # type: ignore[attr-defined]
        return full_logits or why_encoder_runs_twice(self.accelerator.unwrap_model(self.model))

    def _generate_by_length(self, dataloader: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """For each batch of `dataloader`, once all are generated by length: new ids `(batch, new tokens)`, loss sum.

        The sum is over the target tokens of the batch as `dataloader` has it; `None` where it is not known.
        """
        dataset, order, args = dataloader.dataset, list(dataloader.batch_sampler), self.args
        rows = sorted({row for batch in order for row in batch})
        arguments = self._batch_generation_arguments()
        longest = int(arguments.get("max_new_tokens") or arguments["max_length"])
        pad, ends = self._pad_and_end_ids()
        with_loss = args.eval_loss_with_generation and "labels" in dataset[rows[0]]
        if with_loss:
            reason = self._why_encode_twice(dataset[rows[0]])
            self.fast_paths[SHARED_ENCODER].record(reason)
            with_loss = reason is None
        generated: dict[int, np.ndarray] = {}
        losses: dict[int, torch.Tensor] = {}
        lengths, widths = [], []
        for features in map(dataset.__getitem__, rows):
            source = len(features["input_ids"])
            target = len(features.get("labels", ())) if self.family == "encoder_decoder" else 0
            lengths.append(source + target)
            widths.append(source + longest)
        batches = batches_of_like_length(lengths, widths, dataloader.batch_sampler.batch_size)
        hidden = args.disable_tqdm or not self.is_local_process_zero()
        for positions in tqdm(batches, desc="Generating", leave=False, disable=hidden):
            batch = [rows[position] for position in positions]
            inputs = self._prepare_inputs(dataloader.collate_fn([dataset[row] for row in batch]))
            tokens = self._generate_batch(inputs, keep_encoder_outputs=with_loss).cpu().numpy()
            generated.update((row, without_filling(ids, ends, pad)) for row, ids in zip(batch, tokens, strict=True))
            if with_loss:
                losses.update(zip(batch, self._row_losses(inputs).cpu(), strict=True))
        for batch in order:
            loss_sum = torch.stack([losses[row] for row in batch]).sum().to(args.device) if with_loss else None
            yield pad_rows([generated[row] for row in batch], pad, args.device), loss_sum

    def _row_losses(self, inputs: dict[str, Any]) -> torch.Tensor:
        args = self.args
        with torch.no_grad(), self.compute_loss_context_manager():
            model = self.accelerator.unwrap_model(self.model)
            self.fast_paths[LINEAR_CROSS_ENTROPY].record(None)
            return row_losses(
                model,
                inputs["encoder_outputs"],
                inputs,
                args.label_smoothing_factor,
                args.linear_cross_entropy_workspace_bytes,
            )

    def _pad_and_end_ids(self) -> tuple[int, list[int]]:
        """The id that fills generated rows, and those that end them."""
        config = self.accelerator.unwrap_model(self.model).generation_config
        ends = self._batch_generation_arguments().get("eos_token_id", config.eos_token_id)
        return self.processing_class.pad_token_id, [] if ends is None else np.atleast_1d(ends).tolist()

    def _batch_generation_arguments(self) -> dict[str, Any]:
        given = getattr(self, "_gen_kwargs", None) or self._generation_arguments({})
        return {"synced_gpus": is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self.model), **given}

    def _generate_batch(self, inputs: dict[str, Any], keep_encoder_outputs: bool = False) -> torch.Tensor:
        """New token ids, `(batch, new tokens)`, for a batch, to which the encoder's output may be added."""
        speed = self.generation_speed.measure(len(inputs["input_ids"]))
        with torch.no_grad(), self.compute_loss_context_manager(), speed:
            model = self.accelerator.unwrap_model(self.model)
            if keep_encoder_outputs:
                inputs["encoder_outputs"] = encode(model, inputs)
            return self._generate(model, inputs, self._batch_generation_arguments()).contiguous()

    def _generate(self, model: Any, inputs: dict[str, Any], arguments: dict[str, Any]) -> torch.Tensor:
        """New token ids, `(batch, new tokens)`, for a batch."""
        sources = {name: inputs[name] for name in (*SOURCES, TASK_IDS) if name in inputs}
        if "encoder_outputs" in inputs:  # a copy, because beam search repeats the rows in place
            sources["encoder_outputs"] = type(inputs["encoder_outputs"])(**inputs["encoder_outputs"])
        return model.generate(**sources, **arguments)

    def _evaluating_parent(self) -> Any:
        """The class whose `evaluate`, `predict` and `prediction_step` do the work."""
        return super()

    def without_adapter(self) -> contextlib.AbstractContextManager[None]:
        """Inside, `evaluate` and `predict` see the base model. Nothing changes where no adapter is (`full`)."""
        return adapter_disabled(self.accelerator.unwrap_model(self.model))

    def _generation_arguments(self, given: dict[str, Any]) -> dict[str, object]:
        return generation_arguments(self.args.generation_max_length, self.args.generation_num_beams, given)
