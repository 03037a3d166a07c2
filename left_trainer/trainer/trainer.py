"""LeftTrainer: one front door for encoder-decoder and decoder-only models.

Every override of a Hugging Face trainer stands here; what it does stands in the modules beside.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader, Sampler
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

from left_trainer.callbacks.logging import LoggingCallback, use_compact_output
from left_trainer.data.features import AnyDataset, dataset_form, tokenize_pairs, without_appended_end
from left_trainer.evaluation.text_metrics import text_metrics
from left_trainer.kernels.fast_paths import GELU, LORA_LINEAR, FastPath
from left_trainer.kernels.gelu import use_fused_gelu
from left_trainer.kernels.lora_layers import use_lora_linear
from left_trainer.methods.hooks import MethodHooks
from left_trainer.methods.saving import (
    check_saved_adapter,
    complete_adapter_directory,
    restore_training_state,
    saving_active_adapter,
)
from left_trainer.models import ModelSource, unwrapped
from left_trainer.trainer import batching
from left_trainer.trainer.checkpoints import checkpoint_to_resume
from left_trainer.trainer.checks import Request, check
from left_trainer.trainer.columns import with_task_column, with_task_ids
from left_trainer.trainer.evaluation import EvalDatasets, GeneratingTrainer
from left_trainer.trainer.losses import compute_loss
from left_trainer.trainer.model_card import create_model_card
from left_trainer.trainer.preparation import Preparation, method_of, prepare, unrounded_adapter
from left_trainer.trainer.saving import write_settings
from left_trainer.training_args import LeftTrainingArguments, loading_options


class LeftTrainer(GeneratingTrainer):
    """Fine-tune any encoder-decoder or decoder-only language model with any registered method.

    `LeftTrainer(...)` looks at the model and yields a `LeftSeq2SeqTrainer` or a `LeftSFTTrainer`; to override a method
    of the trainer, extend one of these two.

    Args:
        model: A hub name, a path, a `PreTrainedModel`, or a `PeftModel`, whose adapter is trained further. A path may
            hold an adapter; it is then loaded onto its base model and trained further. A `ModelSource` of one of these
            is taken as it is.
        args: `LeftTrainingArguments`. A `Seq2SeqTrainingArguments` or `SFTConfig` is taken with every value kept, the
            learning rate included. The object itself is not changed: `trainer.args` has what was left open.
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
        compute_loss_func: Replaces the loss, but for what a method adds to it. Called as by `Trainer`, with outputs
            whose logits have the length of the labels.
        preprocess_logits_for_metrics: As in `Trainer`.
        formatting_func: As in `SFTTrainer`; decoder-only models.
        quantization_config: Passed to `from_pretrained` when `model` is a name or path.

    Raises:
        ValueError: A model that generates no text, a field that has no effect on this model's family, a combination the
            method does not work with, two losses at once, unusable data or tokenizer. Everything that does not need the
            weights is checked before they are loaded.
        FileExistsError: `output_dir` holds an earlier result.
    """

    optimizer: torch.optim.Optimizer | None
    _signature_columns: list[str] | None

    compute_loss = compute_loss
    create_model_card = create_model_card

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(cls, (Seq2SeqTrainer, SFTTrainer)):
            raise TypeError(
                f"{cls.__name__} extends LeftTrainer, which only chooses a class. Extend the class for your models:\n"
                f"    class {cls.__name__}(LeftSeq2SeqTrainer): ...  # T5, BART, Marian, ...\n"
                f"    class {cls.__name__}(LeftSFTTrainer): ...  # Llama, GPT-2, Qwen, ..."
            )

    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> Self:
        """Choose the concrete class from the model's class or config."""
        if cls is not LeftTrainer:
            return super().__new__(cls)
        source = ModelSource.of(model, loading_options(kwargs.get("args", args[0] if args else None)))
        concrete = LeftSeq2SeqTrainer if source.family == "encoder_decoder" else LeftSFTTrainer
        trainer = super().__new__(concrete)
        trainer.source = source  # so that __init__ does not look it up again
        return trainer  # type: ignore[return-value]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | ModelSource,
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
        args = LeftTrainingArguments.from_arguments(args or LeftTrainingArguments())
        source = self._source_of(model, args)
        method = method_of(source, args, peft_config)
        given = (peft_config, quantization_config, train_dataset, eval_dataset, compute_loss_func, formatting_func)
        request = Request(source, args, method, *given)
        check(request)
        ready = prepare(request, processing_class)
        self._take_over(request, ready)
        if ready.args.predict_with_generate:
            compute_metrics = compute_metrics or text_metrics(ready.tokenizer)
        with unrounded_adapter(ready.model):
            super().__init__(
                model=ready.model,
                args=ready.args,
                data_collator=data_collator or self._default_collator(ready.tokenizer, ready.args),
                train_dataset=self._features(train_dataset, ready.tokenizer, ready.args),
                eval_dataset=self._features(eval_dataset, ready.tokenizer, ready.args),
                processing_class=ready.tokenizer,
                compute_metrics=compute_metrics,
                callbacks=[*self.hooks.callbacks(ready.model), *(callbacks or ())],
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                **({"formatting_func": formatting_func} if self.family == "decoder_only" else {}),
            )
        self._set_up_loss(compute_loss_func)
        use_compact_output(self)

    def _source_of(self, model: Any, args: LeftTrainingArguments) -> ModelSource:
        """What `__new__` has found, or what is found now where a concrete class was called.

        Raises `ValueError` for a model of the other family.
        """
        source = vars(self).get("source") or ModelSource.of(model, loading_options(args))
        if source.family != self.family:
            raise ValueError(
                f"{type(self).__name__} trains {self.family} models and model={source.title!r} is {source.family}: it "
                "would train on another objective than the model's. Use LeftTrainer, which chooses the right class by "
                "itself."
            )
        return source

    def _take_over(self, request: Request, ready: Preparation) -> None:
        """What is known before Hugging Face's constructor runs, and how the model computes from now on."""
        model, args = ready.model, ready.args
        self.source, self.method = request.source, request.method
        self.learning_rate_source = ready.learning_rate_source
        self.rows_were_text = batching.were_text(request.train_dataset)
        self.hooks = MethodHooks(self.method, args.peft_options, is_new=self.source.adapter is None)
        self.fast_paths[LORA_LINEAR] = use_lora_linear(model, args.use_lora_linear)
        self.fast_paths[GELU] = use_fused_gelu(model, args.use_fused_gelu)
        if args.gradient_checkpointing and isinstance(model, PeftModel):
            model.enable_input_require_grads()
        self.hooks.prepare(model)

    def _set_up_loss(self, compute_loss_func: Callable[..., torch.Tensor] | None) -> None:
        """What `compute_loss` goes by, where Hugging Face's constructor would decide otherwise."""
        # Not through the constructor: TRL's warns of a second forward pass, which its own loss would take.
        self.compute_loss_func = compute_loss_func
        self.loss_terms = self.hooks.loss_terms()
        self.model_accepts_loss_kwargs = True  # for any model, the loss is divided by the tokens of all micro-batches

    @functools.cached_property
    def fast_paths(self) -> dict[str, FastPath]:
        """What ran and what fell back, by name; `training_report.json` shows it."""
        return defaultdict(FastPath)

    @property
    def base_model_name(self) -> str:
        """Hub name or path of the model that is fine-tuned; its class where it has neither."""
        return self.source.base_name

    @property
    def has_own_sampler(self) -> bool:
        """Whether a subclass chooses the order of the training rows."""
        return type(self)._get_train_sampler is not LeftTrainer._get_train_sampler

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on with an interrupted run.

        Args:
            resume_from_checkpoint: Path of a checkpoint, or `True` for the last one in `output_dir` that was written
                to its end.
            args: Passed to `Trainer.train`.
            kwargs: Passed to `Trainer.train`.

        Raises:
            FileExistsError: A fresh run, and `output_dir` holds checkpoints of another.
            FileNotFoundError: `True`, and there is no complete checkpoint.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args)
        if not checkpoint:
            self.hooks.initialize(unwrapped(self.model), self._first_batches, self.args.seed)
        return super().train(checkpoint, *args, **kwargs)

    def _first_batches(self, number: int) -> Iterator[dict[str, torch.Tensor]]:
        return map(self._prepare_inputs, itertools.islice(self.get_train_dataloader(), number))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The method's own optimizer where it has one and the user passed none."""
        if self.optimizer is None:
            chosen = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = self.hooks.optimizer(unwrapped(self.model), self.args, chosen)
        return super().create_optimizer(model)

    def parent_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any
    ) -> Any:
        """The loss of Hugging Face's trainer."""
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log_token_metrics(self, n_tokens: torch.Tensor, n_correct: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        """Nothing: `Seq2SeqTrainer` logs the loss alone."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with what our callbacks measured, so that it reaches the trackers too."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LoggingCallback):
                logs.update(callback.take_metrics())
        super().log(logs, start_time)

    # Data

    def _default_collator(self, tokenizer: Any, args: LeftTrainingArguments) -> Any:
        return None

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs(with_task_ids(unwrapped(self.model), inputs))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = with_task_column(unwrapped(self.model), self._signature_columns)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in `Trainer`; notes for the report whether the batches are grouped."""
        self.fast_paths[batching.GROUP_BY_LENGTH].record(batching.why_not_grouped(self, self.train_dataset))
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As in `Trainer`; where text is generated, with a row for each prompt."""
        with batching.one_row_for_each_prompt(self):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As in `Trainer`; where text is generated, with a row for each prompt."""
        with batching.one_row_for_each_prompt(self):
            return super().get_test_dataloader(test_dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if batching.why_not_grouped(self, dataset) is None:
            return batching.length_grouped_sampler(self, dataset)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        if self.args.train_sampling_strategy == batching.GROUP_BY_LENGTH:
            return batching.sequential_sampler(self.args, eval_dataset)
        return super()._get_eval_sampler(eval_dataset)

    # Files

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model, directory = unwrapped(self.model), output_dir or str(self.args.output_dir)
        with saving_active_adapter(model, directory):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            complete_adapter_directory(model, directory)
            write_settings(self, directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.hooks.restore(unwrapped(self.model), resume_from_checkpoint)
        check_saved_adapter(unwrapped(self.model), resume_from_checkpoint)
        if not restore_training_state(unwrapped(self.model), resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not restore_training_state(unwrapped(self.model), self.state.best_model_checkpoint):
            super()._load_best_model()


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


class LeftSFTTrainer(LeftTrainer, SFTTrainer):
    """`LeftTrainer` for decoder-only models, on top of `trl.SFTTrainer`."""

    family = "decoder_only"

    def _features(self, dataset: Any, tokenizer: Any, args: LeftTrainingArguments) -> Any:
        # SFTTrainer prepares what it is constructed with and what `evaluate` gets, but not what `predict` gets.
        prepared = getattr(self, "completion_only_loss", None) is not None
        if not prepared or not isinstance(dataset, Dataset) or "input_ids" in dataset.column_names:
            return dataset
        return self._prepare_dataset(dataset, tokenizer, args, False, self._formatting_func, "eval")

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._prepare_dataset(dataset, without_appended_end(processing_class), *args, **kwargs)

    def log_token_metrics(self, n_tokens: torch.Tensor, n_correct: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        """What `SFTTrainer` logs beside the loss, but for the entropy, which costs another pass over the logits."""
        mode, mask = "train" if self.model.training else "eval", inputs.get("attention_mask")
        n_inputs = n_tokens.new_tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
        counts = torch.stack((n_tokens, n_correct, n_inputs)).unsqueeze(0)
        n_targets, n_right, n_positions = self.accelerator.gather_for_metrics(counts).sum(0).tolist()
        self._metrics[mode]["mean_token_accuracy"].append(n_right / n_targets if n_targets else 0.0)
        if mode == "train":
            self._total_train_tokens += n_positions
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
