"""LeftTrainer: one front door for encoder-decoder and decoder-only models.

The overrides of Hugging Face's trainers stand here, and those of what is evaluated and read in `evaluation` and
`reading`. What they do stands in the modules beside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Seq2SeqTrainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalPrediction
from trl import SFTTrainer

from left_trainer.callbacks.logging import LoggingCallback, use_compact_output
from left_trainer.data.collator import corrected_collator, seq2seq_collator
from left_trainer.data.dataset_types import AnyDataset
from left_trainer.data.features import without_appended_end
from left_trainer.evaluation.text_metrics import metrics_for
from left_trainer.kernels.dropout import dropout_of_run
from left_trainer.kernels.fused_layers import use_fused_layers
from left_trainer.methods.hooks import MethodHooks
from left_trainer.models import ModelSource, unwrapped
from left_trainer.trainer import batching, features
from left_trainer.trainer.checkpoints import asks_to_resume
from left_trainer.trainer.checks import Request, check, check_family
from left_trainer.trainer.compiling import CompilingTrainer
from left_trainer.trainer.divergence import DivergenceCheck
from left_trainer.trainer.evaluation import EvalDatasets
from left_trainer.trainer.first_batches import initialize_from_all_rows
from left_trainer.trainer.fresh_models import first_source, prepare_fresh_model, with_method_options
from left_trainer.trainer.generation import use_generation_config
from left_trainer.trainer.guarded import guarded_training
from left_trainer.trainer.kept_answers import keep_answers
from left_trainer.trainer.losses import AddedTerms, compute_loss
from left_trainer.trainer.model_card import create_model_card_as_transformers, create_model_card_as_trl
from left_trainer.trainer.neftune import neftune_callbacks
from left_trainer.trainer.optimizers import check_optimizer_trains, class_and_arguments
from left_trainer.trainer.preparation import (
    Preparation,
    method_of,
    prepare,
    tokenizer_without_tokens,
    unrounded_adapter,
    without_adapter_on_head,
)
from left_trainer.trainer.saving import saved_whole
from left_trainer.trainer.shrinking import shrinking_callbacks, shrinking_of
from left_trainer.trainer.teacher_checks import teacher_source
from left_trainer.trainer.teaching import callbacks_of, make_teaching, with_projections
from left_trainer.training_args import LeftTrainingArguments


class LeftTrainer(CompilingTrainer):
    """Fine-tune any encoder-decoder or decoder-only language model with any registered method.

    `LeftTrainer(...)` looks at the model and yields a `LeftSeq2SeqTrainer` or a `LeftSFTTrainer`; to override a method
    of the trainer, extend one of these two.

    Args:
        model: A hub name, a path, a `PreTrainedModel`, or a `PeftModel`, whose adapter is trained further. A path may
            hold an adapter; it is then loaded onto its base model and trained further. A `ModelSource` of one of these
            is taken as it is.
        args: `LeftTrainingArguments`. A `Seq2SeqTrainingArguments` or `SFTConfig` is taken with every value kept, the
            learning rate included; it names no method and means `full`, as in the trainer it was written for. The
            object itself is not changed: `trainer.args` has what was left open.
        data_collator: By default one that pads to the longest row of the batch.
        train_dataset: Rows with `prompt` and `completion`, or tokenized features with `input_ids` and `labels`; for
            decoder-only models also TRL's `text` and `messages`. A dataset of `datasets`, in any format, a list of
            dicts, or a dataset of torch.
        eval_dataset: The same, or a dict of several.
        processing_class: The tokenizer; by default the one saved with the model. With tokenized rows and a
            `data_collator` there need not be one.
        model_init: Makes the model, in place of `model`, anew for each call of `train` and each trial of
            `hyperparameter_search`; the method is applied to each.
        compute_metrics: Function of an `EvalPrediction`. With `predict_with_generate` the default is ROUGE, BLEU, chrF
            and exact match.
        callbacks: Further callbacks.
        optimizers: An optimizer and a scheduler, instead of those that `args` describe. The optimizer has to be made
            of parameters that are trained: of a model that already has its adapter, or for `full`.
        optimizer_cls_and_kwargs: Class and arguments of the optimizer, which is made of what is trained. The learning
            rate is that of `args` unless it is among them.
        compute_loss_func: Replaces the loss, but for what a method adds to it. Called as by `Trainer`, with outputs
            whose logits have the length of the labels.
        preprocess_logits_for_metrics: As in `Trainer`.
        formatting_func: As in `SFTTrainer`; decoder-only models.
        quantization_config: Passed to `from_pretrained` when `model` is a name or path.
        peft_config: An explicit PEFT config; beats `args.peft_method`.
        peft_method: As in `LeftTrainingArguments`, beats `args`; for arguments of another class.
        peft_kwargs: The same.
        teacher_model: As in `LeftTrainingArguments`, or a loaded model; see `args.distillation_kwargs`.

    Raises:
        ValueError: A model that generates no text, a field that has no effect on this model's family, a combination the
            method does not work with, two losses at once, unusable data or tokenizer. Everything that does not need the
            weights is checked before they are loaded.
        FileExistsError: `output_dir` holds an earlier result.
    """

    optimizer: torch.optim.Optimizer | None
    _signature_columns: list[str] | None

    compute_loss = compute_loss

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
        given = kwargs.get("args", args[0] if args else None) or LeftTrainingArguments()
        source = first_source(model, kwargs.get("model_init"), given)
        concrete = LeftSeq2SeqTrainer if source.family == "encoder_decoder" else LeftSFTTrainer
        trainer = super().__new__(concrete)
        trainer.source = source  # so that __init__ does not look it up again
        return trainer  # type: ignore[return-value]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | ModelSource | None = None,
        args: LeftTrainingArguments | TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: EvalDatasets | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,  # what follows has another order in each of Hugging Face's trainers
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        peft_method: str | None = None,
        peft_kwargs: str | Mapping[str, Any] | None = None,
        teacher_model: str | PreTrainedModel | PeftModel | None = None,
    ) -> None:
        args = LeftTrainingArguments.from_arguments(args or LeftTrainingArguments(), peft_method, peft_kwargs)
        train_dataset, eval_dataset = features.given_datasets(train_dataset, eval_dataset)
        # Found already where `LeftTrainer` has chosen the class.
        source = vars(self).get("source") or first_source(model, model_init, args)
        check_family(source, self.family, type(self).__name__)
        given = (peft_config, quantization_config, train_dataset, eval_dataset, compute_loss_func, formatting_func)
        of_training = (data_collator, optimizers, optimizer_cls_and_kwargs, model_init is not None)
        method = method_of(source, args, peft_config)
        teacher = teacher_source(teacher_model, args)
        request = Request(source, args, method, *given, *of_training, peft_method is not None, compute_metrics, teacher)
        check(request)
        ready = prepare(request, processing_class)
        self.cut_rows = {}
        self.take_over(request, ready)
        if ready.args.predict_with_generate and ready.tokenizer is not None:
            compute_metrics = metrics_for(compute_metrics, ready.tokenizer)
        with unrounded_adapter(ready.model), without_adapter_on_head(ready.model, args.loss_type):
            super().__init__(
                model=ready.model,
                # TRL would warn that model_init_kwargs is ignored; the model was loaded with it.
                args=batching.with_own_batches(ready.args, train_dataset).replaced(model_init_kwargs=None),
                data_collator=self._collator(data_collator, ready.tokenizer, ready.args),
                train_dataset=self._features(train_dataset, ready.tokenizer, ready.args, "train"),
                eval_dataset=self._features(eval_dataset, ready.tokenizer, ready.args, "eval"),
                processing_class=ready.tokenizer or tokenizer_without_tokens(self.family),
                compute_metrics=compute_metrics,
                callbacks=[*self.callbacks_of_method, *neftune_callbacks(args), *(callbacks or ())],
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                **({"formatting_func": formatting_func} if self.family == "decoder_only" else {}),
            )
        self.neftune_noise_alpha = None  # Trainer's own hook is put where many models do not compute
        self.args = self.args.replaced(model_init_kwargs=ready.args.model_init_kwargs)
        self.processing_class = self.callback_handler.processing_class = ready.tokenizer
        # Not through the constructor: neither of Hugging Face's trainers takes both.
        self.model_init, self.optimizer_cls_and_kwargs = model_init, optimizer_cls_and_kwargs
        self._remember_rows(eval_dataset)
        self._set_up_loss(compute_loss_func)
        use_generation_config(ready.model, ready.args.generation_config)
        features.tell_cuts(self)
        use_compact_output(self)

    def take_over(self, request: Request, ready: Preparation) -> None:
        """What is known of a model before Hugging Face's trainer has it, and how it computes from now on."""
        model, args = ready.model, ready.args
        self.request, self.source, self.method = request, request.source, request.method
        self.learning_rate_source = ready.learning_rate_source
        self.free_positions, self.planned, self.vocabulary = ready.free_positions, ready.planned, ready.vocabulary
        self.teaching = make_teaching(request, ready)
        self.rows_were_text = batching.were_text(request.train_dataset)
        self._rows_to_train_on = request.train_dataset
        self.hooks = MethodHooks(self.method, args.peft_options, is_new=self.source.adapter is None)
        self.fast_paths |= use_fused_layers(model, args)
        self.compile_blocks(model, args)
        if args.gradient_checkpointing and isinstance(model, PeftModel):
            model.enable_input_require_grads()
        self.hooks.prepare(model)
        self.shrinking = shrinking_of(self, args, model)
        self.callbacks_of_method = [
            *self.hooks.callbacks(model),
            *callbacks_of(self.teaching),
            *shrinking_callbacks(self.shrinking),
        ]
        self.loss_terms = self.hooks.loss_terms()
        check_optimizer_trains(model, request.optimizers[0])

    def _set_up_loss(self, compute_loss_func: Callable[..., torch.Tensor] | None) -> None:
        """What `compute_loss` goes by, where Hugging Face's constructor would decide otherwise."""
        # Not through the constructor: TRL's warns of a second forward pass, which its own loss would take.
        self.compute_loss_func = compute_loss_func
        self._divergence = DivergenceCheck()
        self.added_terms = AddedTerms()
        self.model_accepts_loss_kwargs = True  # for any model, the loss is divided by the tokens of all micro-batches

    @property
    def base_model_name(self) -> str:
        """Hub name or path of the model that is fine-tuned; its class where it has neither."""
        return self.source.base_name

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on with an interrupted run.

        Args:
            resume_from_checkpoint: Path of a checkpoint, or `True` for the last whole one in `output_dir`, and for the
                beginning where there is none.
            args: Passed to `Trainer.train`.
            kwargs: Passed to `Trainer.train`.

        A second call trains the weights further, as in `Trainer`, and its checkpoints replace those of the first; with
        `model_init` it starts from a fresh model.

        Raises:
            FileExistsError: A fresh run, and `output_dir` holds the result or checkpoints of another.
            ValueError: The checkpoint is not whole, or is of another run.
            FolderInUseError: Another process trains in `output_dir`.
            WriteFailedError: The disk is full, read-only or gone; the checkpoints that were there still are.
            KeyboardInterrupt: After Ctrl-C, once a checkpoint is saved (`save_on_signal`); `SystemExit` after SIGTERM.
        """
        with guarded_training(self), dropout_of_run(self.args, self.fast_paths, self.args.device):
            if self.model_init is None:
                keep_answers(self)
            checkpoint = self.checkpoint_of_run(resume_from_checkpoint)
            self.starts_anew = not checkpoint
            if self.starts_anew and self.model_init is None:
                self.initialize_method()
            # What a run left that was killed before its first checkpoint was whole, such as adapters, is written over.
            over = self.starts_anew and asks_to_resume(resume_from_checkpoint) is not False
            with self.with_arguments(overwrite_output_dir=True) if over else contextlib.nullcontext():
                return super().train(checkpoint, *args, **kwargs)

    def initialize_method(self) -> None:
        """Shrink the model as far as that is due before the first step, and set the weights of a new adapter."""
        with self.with_plain_blocks():
            self.begin_shrinking()
            initialize_from_all_rows(self)

    def call_model_init(self, trial: Any = None) -> Any:
        """The model of `model_init`, with the method on it that the arguments, or a trial of a search, ask for."""
        return prepare_fresh_model(self, super().call_model_init(trial), trial)

    def hyperparameter_search(self, hp_space: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, with `model_init`.

        Args:
            hp_space: May also return `peft_method`, `peft_kwargs` as a dict, and options of the method by name, such as
                `{"learning_rate": trial.suggest_float(...), "r": trial.suggest_categorical("r", [4, 8])}`.
            args: Passed to `Trainer.hyperparameter_search`.
            kwargs: Passed to `Trainer.hyperparameter_search`.
        """
        request = self.request
        space = None if hp_space is None else lambda trial: with_method_options(hp_space(trial), request)
        return super().hyperparameter_search(space, *args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As in `Trainer`. What is returned, and so logged, is the loss of the task: a penalty is logged apart."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._divergence.see_loss(loss)
        return self.added_terms.take_from(loss, self.state.global_step)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._divergence.check(self, norm)
        return norm

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The method's own optimizer where it has one and the user passed none."""
        self.prepare_to_shard()
        if self.optimizer is None:
            self.optimizer_cls_and_kwargs = class_and_arguments(self.optimizer_cls_and_kwargs, self.args)
            chosen = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = self.hooks.optimizer(unwrapped(self.model), self.args, chosen)
        return with_projections(super().create_optimizer(model), self.teaching, self.args.device)

    def parent_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any
    ) -> Any:
        """The loss of Hugging Face's trainer."""
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log_token_metrics(self, n_tokens: torch.Tensor, n_correct: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        """Nothing: `Seq2SeqTrainer` logs the loss alone."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with a penalty and what our callbacks measured, so that they reach the trackers too."""
        if "loss" in logs:
            logs.update(self.added_terms.mean_since_log(self.state.global_step, self.accelerator))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LoggingCallback):
                logs.update(callback.take_metrics())
        super().log(logs, start_time)

    # Files

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with saved_whole(self, output_dir or str(self.args.output_dir)) as directory:
            super()._save(directory, state_dict)


class LeftSeq2SeqTrainer(LeftTrainer, Seq2SeqTrainer):
    """`LeftTrainer` for encoder-decoder models, on top of `transformers.Seq2SeqTrainer`."""

    family = "encoder_decoder"
    create_model_card = create_model_card_as_transformers

    def _features(self, dataset: Any, tokenizer: Any, args: LeftTrainingArguments, split: str = "eval") -> Any:
        if isinstance(dataset, dict):
            return {name: self._features(part, tokenizer, args, f"{split}_{name}") for name, part in dataset.items()}
        if dataset is None or isinstance(dataset, str):
            return dataset
        return features.seq2seq_features(self, dataset, tokenizer, args, split)

    def _evaluating_parent(self) -> Any:
        # Seq2SeqTrainer gathers the rows that pad the last batch of several processes too, so that metrics count them
        # twice, and pads every generated batch to the length limit (transformers 5.23).
        return super(Seq2SeqTrainer, self)

    def _collator(self, given: Any, tokenizer: Any, args: LeftTrainingArguments) -> Any:
        return corrected_collator(given) if given else seq2seq_collator(tokenizer, args.pad_to_multiple_of)


class LeftSFTTrainer(LeftTrainer, SFTTrainer):
    """`LeftTrainer` for decoder-only models, on top of `trl.SFTTrainer`."""

    family = "decoder_only"
    create_model_card = create_model_card_as_trl

    def _features(self, dataset: Any, tokenizer: Any, args: LeftTrainingArguments, split: str = "eval") -> Any:
        # What goes to the constructor is prepared there.
        constructed = getattr(self, "completion_only_loss", None) is not None
        is_ready = (args.dataset_kwargs or {}).get("skip_prepare_dataset", False)
        if not constructed or is_ready or not isinstance(dataset, Dataset | IterableDataset):
            return dataset
        packing = args.packing if args.eval_packing is None or split == "train" else args.eval_packing
        tokenize = super()._prepare_dataset
        return features.sft_features(self, tokenize, dataset, tokenizer, args, packing, self._formatting_func, split)

    def _evaluating_parent(self) -> Any:
        # SFTTrainer would prepare the rows again, and leave out those that it cuts to nothing.
        return super(SFTTrainer, self)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """As in `SFTTrainer`; of an evaluation every row is kept, in its order."""
        tokenizer = without_appended_end(processing_class)
        split = "eval" if dataset_name == "eval" else f"eval_{dataset_name}"
        if dataset is self._rows_to_train_on:  # which come first; the same rows may be evaluated later
            self._rows_to_train_on, split = None, "train"
        tokenize = super()._prepare_dataset
        return features.sft_features(self, tokenize, dataset, tokenizer, args, packing, formatting_func, split)

    def log_token_metrics(self, n_tokens: torch.Tensor, n_correct: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        """What `SFTTrainer` logs beside the loss, but for the entropy, which costs another pass over the logits."""
        mode, mask = "train" if self.model.training else "eval", inputs.get("attention_mask")
        n_inputs = n_tokens.new_tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
        counts = torch.stack((n_tokens, n_correct, n_inputs)).unsqueeze(0)
        n_targets, n_right, n_positions = self.accelerator.gather(counts).sum(0).tolist()
        self._metrics[mode]["mean_token_accuracy"].append(n_right / n_targets if n_targets else 0.0)
        if mode == "train":
            self._total_train_tokens += n_positions
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
