"""LeftTrainer: one front door for encoder-decoder and decoder-only models."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalPrediction
from trl import SFTTrainer

from left_trainer import checks
from left_trainer.adapter_files import complete_adapter_directory, load_training_only_state, without_rank_warnings
from left_trainer.callbacks.logging import LoggingCallback, use_compact_output
from left_trainer.data.features import AnyDataset, dataset_form, named_datasets, tokenize_pairs
from left_trainer.data.sampling import BatchingMixin
from left_trainer.evaluation.generation import GenerationSpeed, generate_completions, split_prompts
from left_trainer.evaluation.loop import EvalDatasets, EvaluationMixin
from left_trainer.evaluation.text_metrics import text_metrics
from left_trainer.kernels.fast_paths import GELU, LORA_LINEAR
from left_trainer.kernels.gelu import use_fused_gelu
from left_trainer.kernels.head_loss import HeadLossMixin
from left_trainer.kernels.lora_layers import use_lora_linear
from left_trainer.loss import accumulated_token_loss, share_of_tokens
from left_trainer.methods import get_method
from left_trainer.methods.hooks import MethodHooks
from left_trainer.model_card import ModelCardMixin
from left_trainer.models import is_adapter_directory, load_config, unwrapped
from left_trainer.preparation import (
    default_generation_length,
    family_of,
    is_quantized,
    method_of,
    options_from_data,
    prepare_model,
    unrounded_adapter,
)
from left_trainer.task_ids import TaskIdsMixin
from left_trainer.training_args import LeftTrainingArguments, loading_options


class LeftTrainer(EvaluationMixin, ModelCardMixin, TaskIdsMixin, BatchingMixin, HeadLossMixin):
    """Fine-tune any encoder-decoder or decoder-only language model with any registered method.

    `LeftTrainer(...)` looks at the model and yields a `LeftSeq2SeqTrainer` or a `LeftSFTTrainer`; to override a method
    of the trainer, extend one of these two.

    Args:
        model: A hub name, a path, a `PreTrainedModel`, or a `PeftModel`, whose adapter is trained further. A path may
            hold an adapter; it is then loaded onto its base model and trained further.
        args: `LeftTrainingArguments`. A `Seq2SeqTrainingArguments` or `SFTConfig` is taken with every value kept, the
            learning rate included.
        train_dataset: Rows with `prompt` and `completion`, or tokenized features with `input_ids` and `labels`; for
            decoder-only models also TRL's `text` and `messages`.
        eval_dataset: The same, or a dict of several.
        processing_class: The tokenizer; by default the one saved with the model.
        peft_config: An explicit PEFT config; beats `args.peft_method`.
        data_collator: By default one that pads to the longest row of the batch.
        compute_metrics: Function of an `EvalPrediction`. With `predict_with_generate` the default is ROUGE, BLEU, chrF
            and exact match.
        callbacks: Further callbacks.
        optimizers: An optimizer and a scheduler, instead of those that `args` describe.
        compute_loss_func: Replaces the loss.
        preprocess_logits_for_metrics: As in `Trainer`.
        formatting_func: As in `SFTTrainer`; decoder-only models.
        quantization_config: Passed to `from_pretrained` when `model` is a name or path.

    Raises:
        ValueError: A model that generates no text, a field that has no effect on this model's family, a combination the
            method does not work with, unusable data or tokenizer. Everything that does not need the weights is
            checked before they are loaded.
        FileExistsError: `output_dir` holds an earlier result.
    """

    optimizer: torch.optim.Optimizer | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(cls, (Seq2SeqTrainer, SFTTrainer)):
            raise TypeError(
                f"{cls.__name__} extends LeftTrainer, which only chooses a class. Extend the one for your models:\n"
                f"    class {cls.__name__}(LeftSeq2SeqTrainer): ...  # T5, BART, Marian, ...\n"
                f"    class {cls.__name__}(LeftSFTTrainer): ...  # Llama, GPT-2, Qwen, ..."
            )

    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> Self:
        """Choose the concrete class from the model's class or config."""
        if cls is not LeftTrainer:
            return super().__new__(cls)
        family = family_of(model, kwargs.get("args", args[0] if args else None))
        concrete = LeftSeq2SeqTrainer if family == "encoder_decoder" else LeftSFTTrainer
        return super().__new__(concrete)  # type: ignore[return-value]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: LeftTrainingArguments | TrainingArguments | None = None,
        *,
        train_dataset: AnyDataset | None = None,
        eval_dataset: EvalDatasets | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        quantization_config: Any = None,
    ) -> None:
        # A copy, because what the method decides (the learning rate) must not stick to the user's object.
        args = copy.copy(LeftTrainingArguments.from_arguments(args or LeftTrainingArguments()))
        self._check_family(model, args)
        if formatting_func is not None and self.family == "encoder_decoder":
            raise ValueError("formatting_func has no effect on an encoder-decoder model. Pass prompt/completion rows.")
        config = load_config(model, **loading_options(args)) if isinstance(model, str) else model.config
        method = method_of(model, args, peft_config)
        checks.check_devices(args)
        checks.check_evaluation_loss(args, eval_dataset)
        checks.check_precision(args, config)
        checks.check_method(args, method, self.family, quantization_config is not None or is_quantized(config))
        checks.check_task_ids(args, method, self.family, train_dataset)
        checks.check_output_dir(args)
        if formatting_func is None:
            for argument, dataset in named_datasets(train_dataset, eval_dataset).items():
                dataset_form(dataset, self.family, argument, args.dataset_text_field)
        tokenizer = processing_class or checks.load_tokenizer(
            model if isinstance(model, str) else config._name_or_path, args
        )
        checks.check_tokenizer(tokenizer, args, config)
        args.peft_kwargs = options_from_data(method, args, tokenizer, train_dataset)
        has_adapter = isinstance(model, PeftModel) or (isinstance(model, str) and is_adapter_directory(model))
        model = prepare_model(model, args, config, peft_config, quantization_config)
        self.fast_paths[LORA_LINEAR] = use_lora_linear(model, args.use_lora_linear)
        self.fast_paths[GELU] = use_fused_gelu(model, args.use_fused_gelu)
        if args.learning_rate is None:
            args.learning_rate = method.learning_rate if method else get_method("lora").learning_rate
        if args.gradient_checkpointing and isinstance(model, PeftModel):
            model.enable_input_require_grads()
        if args.predict_with_generate:
            compute_metrics = compute_metrics or text_metrics(tokenizer)
            args.generation_max_length = args.generation_max_length or default_generation_length(model)
        self.settle_batches(train_dataset, args)
        self.generation_speed = GenerationSpeed()
        self.method, self.hooks = method, MethodHooks(method, model, args.peft_kwargs, is_new=not has_adapter)
        with unrounded_adapter(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator or self._default_collator(tokenizer, args),
                train_dataset=self._features(train_dataset, tokenizer, args),
                eval_dataset=self._features(eval_dataset, tokenizer, args),
                processing_class=tokenizer,
                compute_loss_func=compute_loss_func,
                compute_metrics=compute_metrics,
                callbacks=[*self.hooks.callbacks(model), *(callbacks or ())],
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                **({"formatting_func": formatting_func} if self.family == "decoder_only" else {}),
            )
        use_compact_output(self)

    def _check_family(self, model: str | PreTrainedModel | PeftModel, args: LeftTrainingArguments) -> None:
        family = family_of(model, args)
        if family != self.family:
            name = model if isinstance(model, str) else type(model).__name__
            raise ValueError(
                f"{type(self).__name__} trains {self.family} models and model={name!r} is {family}: it would train on "
                "another objective than the model's. Use LeftTrainer, which chooses the right class by itself."
            )
        args.check_family(self.family)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on with an interrupted run.

        Args:
            resume_from_checkpoint: Path of a checkpoint, or `True` for the last one in `output_dir` that was written
                to its end.
            args: Passed to `Trainer.train`.
            kwargs: Passed to `Trainer.train`.

        Raises:
            FileExistsError: A fresh run, and `output_dir` holds checkpoints of another.
        """
        if str(resume_from_checkpoint).lower() == "true":  # also as a flag: --resume_from_checkpoint true
            resume_from_checkpoint = checks.last_complete_checkpoint(self.args.output_dir)
        elif not resume_from_checkpoint and self.args.save_strategy != "no":
            checks.clear_checkpoints(self.args)
        if not resume_from_checkpoint:
            self.hooks.initialize(unwrapped(self.model), self._first_batches, self.args.seed)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _first_batches(self, number: int) -> Iterator[dict[str, torch.Tensor]]:
        return map(self._prepare_inputs, itertools.islice(self.get_train_dataloader(), number))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The method's own optimizer where it has one and the user passed none."""
        if self.optimizer is None:
            chosen = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = self.hooks.optimizer(unwrapped(self.model), self.args, chosen)
        return super().create_optimizer(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with what our callbacks measured, so that it reaches the trackers too."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LoggingCallback):
                logs.update(callback.take_metrics())
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = unwrapped(self.model)
        with without_rank_warnings(model):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            complete_adapter_directory(model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.hooks.restore(unwrapped(self.model), resume_from_checkpoint)
        if not self._restore_training_state(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._restore_training_state(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _restore_training_state(self, checkpoint: str) -> bool:
        """Load what the method trains from its sidecar. `False` where the adapter file is all there is.

        `Trainer` would put P-tuning's computed prompts where its encoder's own input belongs.
        """
        return load_training_only_state(unwrapped(self.model), checkpoint)

    def _default_collator(self, tokenizer: Any, args: LeftTrainingArguments) -> Any:
        return None


class LeftSeq2SeqTrainer(LeftTrainer, Seq2SeqTrainer):
    """`LeftTrainer` for encoder-decoder models, on top of `transformers.Seq2SeqTrainer`."""

    family = "encoder_decoder"

    def _features(self, dataset: Any, tokenizer: Any, args: LeftTrainingArguments) -> Any:
        if isinstance(dataset, dict):
            return {name: self._features(part, tokenizer, args) for name, part in dataset.items()}
        if dataset is None or isinstance(dataset, str):
            return dataset
        if dataset_form(dataset, self.family, "dataset") == ("input_ids", "labels"):
            return dataset
        return tokenize_pairs(dataset, tokenizer, args.max_length, args.truncation_mode, args.dataset_num_proc)

    def _evaluating_parent(self) -> Any:
        # Seq2SeqTrainer gathers the rows that pad the last batch of several processes too, so that metrics count them
        # twice, and pads every generated batch to the length limit (transformers 5.23).
        return super(Seq2SeqTrainer, self)

    def _default_collator(self, tokenizer: Any, args: LeftTrainingArguments) -> Any:
        return DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=args.pad_to_multiple_of)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The token mean over the accumulated batch, see `accumulated_token_loss`."""
        if self.compute_loss_func is not None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        outputs, batch_mean = self.outputs_and_token_mean(model, inputs, return_outputs)
        ranks = self.loss_ranks
        loss = accumulated_token_loss(batch_mean, labels, num_items_in_batch, ranks)
        if model.training:
            share = share_of_tokens(labels, num_items_in_batch, ranks)
            loss = self.hooks.add_penalty(loss, unwrapped(model), share)
        return (loss, outputs) if return_outputs else loss


class LeftSFTTrainer(LeftTrainer, SFTTrainer):
    """`LeftTrainer` for decoder-only models, on top of `trl.SFTTrainer`, whose loss is the same token mean."""

    family = "decoder_only"

    def _features(self, dataset: Any, tokenizer: Any, args: LeftTrainingArguments) -> Any:
        # SFTTrainer prepares what it is constructed with and what `evaluate` gets, but not what `predict` gets.
        prepared = getattr(self, "completion_only_loss", None) is not None
        if not prepared or not isinstance(dataset, Dataset) or "input_ids" in dataset.column_names:
            return dataset
        return self._prepare_dataset(dataset, tokenizer, args, False, self._formatting_func, "eval")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's token mean over the accumulated batch, or the method's own loss, and the method's penalty."""
        labels = inputs.get("labels")
        ranks = self.loss_ranks
        if self.method and self.method.loss:
            self.note_full_logits(f"peft_method={self.method.name!r} computes the loss")
            loss, outputs = self.method.loss(model, inputs, num_items_in_batch, ranks)
        else:  # outputs that nobody asked for would cost TRL a second forward pass
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = result if return_outputs else (result, None)
        if model.training and labels is not None:
            share = share_of_tokens(labels, num_items_in_batch, ranks)
            loss = self.hooks.add_penalty(loss, unwrapped(model), share)
        return (loss, outputs) if return_outputs else loss

    def _generate(self, model: Any, inputs: dict[str, Any], arguments: dict[str, Any]) -> torch.Tensor:
        return generate_completions(model, split_prompts(inputs), self.processing_class.pad_token_id, **arguments)
