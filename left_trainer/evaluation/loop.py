"""Evaluation of a trainer: raw rows, generation, the model without its adapter."""

from __future__ import annotations

import contextlib
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.trainer_utils import PredictionOutput

from left_trainer.data.features import AnyDataset
from left_trainer.evaluation.generation import GenerationSpeed, adapter_disabled, generation_arguments
from left_trainer.task_ids import TASK_IDS
from left_trainer.training_args import LeftTrainingArguments

EvalDatasets: TypeAlias = AnyDataset | dict[str, AnyDataset]


class EvaluationMixin(Trainer):
    """`evaluate` and `predict` of `LeftTrainer`."""

    args: LeftTrainingArguments
    generation_speed: GenerationSpeed

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
        loss = parent.prediction_step(model, dict(inputs), True, ignore_keys)[0] if labels is not None else None
        arguments = getattr(self, "_gen_kwargs", None) or self._generation_arguments({})
        arguments.setdefault("synced_gpus", is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self.model))
        speed = self.generation_speed.measure(len(inputs["input_ids"]))
        with torch.no_grad(), self.compute_loss_context_manager(), speed:
            tokens = self._generate(self.accelerator.unwrap_model(model), inputs, arguments)
        return loss, tokens.contiguous(), labels

    def _generate(self, model: Any, inputs: dict[str, Any], arguments: dict[str, Any]) -> torch.Tensor:
        """New token ids, `(batch, new tokens)`, for a batch."""
        sources = {name: inputs[name] for name in ("input_ids", "attention_mask", TASK_IDS) if name in inputs}
        return model.generate(**sources, **arguments)

    def _evaluating_parent(self) -> Any:
        """The class whose `evaluate`, `predict` and `prediction_step` do the work."""
        return super()

    def without_adapter(self) -> contextlib.AbstractContextManager[None]:
        """Inside, `evaluate` and `predict` see the base model. Nothing changes where no adapter is (`full`)."""
        return adapter_disabled(self.accelerator.unwrap_model(self.model))

    def _generation_arguments(self, given: dict[str, Any]) -> dict[str, object]:
        return generation_arguments(self.args.generation_max_length, self.args.generation_num_beams, given)
