"""What can be refused before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from left_trainer.adapters.task_ids import TASK_IDS, number_of_tasks
from left_trainer.argument_checks import check_arguments
from left_trainer.data.dataset_types import AnyDataset, is_lazy
from left_trainer.data.features import MASKS, dataset_form, named_datasets
from left_trainer.data.lengths import row_lengths
from left_trainer.methods import PeftMethod, get_method
from left_trainer.methods.apply import check_packages, is_made_by
from left_trainer.methods.method import Feature
from left_trainer.methods.options import plain_options
from left_trainer.models import ModelFamily, ModelSource
from left_trainer.models.languages import check_languages
from left_trainer.models.positions import Limits
from left_trainer.models.source import HUB_ARGUMENTS
from left_trainer.token_mean import IGNORE_INDEX
from left_trainer.trainer.batching import check_batches_can_be_joined
from left_trainer.trainer.device_checks import check_devices, check_fast_dropout
from left_trainer.trainer.optimizers import ClassAndArguments, Optimizers, check_optimizer
from left_trainer.trainer.run_checks import check_best_metric, check_precision, check_run_arguments, check_writable
from left_trainer.trainer.sharding_checks import SHARDED, check_sharding, shards_weights
from left_trainer.trainer.shrink_checks import check_shrinking, check_shrinking_data
from left_trainer.training_args import LeftTrainingArguments

ARTICLES = {"encoder_decoder": "an", "decoder_only": "a"}


@dataclass(frozen=True)
class Request:
    """What a user asks of a trainer.

    Args:
        source: The model.
        args: As given.
        method: What will be trained; `None` for a PEFT config without a record, of which nothing is known.
        peft_config: An explicit one.
        quantization_config: The same.
        train_dataset: As given.
        eval_dataset: As given.
        compute_loss_func: Replaces the loss.
        formatting_func: Of `SFTTrainer`.
        data_collator: As given.
        optimizers: The same.
        optimizer_cls_and_kwargs: The same.
        makes_models: Whether the model is of `model_init`.
        names_method: Whether `peft_method` was an argument of the trainer, and not of `args`.
        compute_metrics: As given.
        teacher: A model, `base` or `self`; `None` where there is no teacher.
    """

    source: ModelSource
    args: LeftTrainingArguments
    method: PeftMethod | None
    peft_config: PeftConfig | None = None
    quantization_config: Any = None
    train_dataset: Any = None
    eval_dataset: Any = None
    compute_loss_func: Callable[..., Any] | None = None
    formatting_func: Callable[..., Any] | None = None
    data_collator: Callable[..., Any] | None = None
    optimizers: Optimizers = (None, None)
    optimizer_cls_and_kwargs: ClassAndArguments | None = None
    makes_models: bool = False
    names_method: bool = False
    compute_metrics: Callable[..., Any] | None = None
    teacher: ModelSource | str | None = None

    @property
    def rows_are_tokens(self) -> bool:
        """Whether every dataset that was given holds token ids."""
        datasets = named_datasets(self.train_dataset, self.eval_dataset).values()
        return all("input_ids" in next(iter(dataset), ()) for dataset in datasets)

    @property
    def is_taught(self) -> bool:
        """Whether the loss of a step has a teacher's part."""
        return self.teacher is not None and self.args.distillation.runs_teacher

    @property
    def is_quantized(self) -> bool:
        """Whether the base model is, or will be, quantized."""
        return self.quantization_config is not None or self.source.is_quantized


def check(request: Request) -> None:
    """Run every check, the cheap ones first.

    Raises:
        ValueError: Something that this model, this method or the other arguments do not go together with.
        FileExistsError, PermissionError: `output_dir` holds an earlier result, or cannot be written.
    """
    check_model_and_method(request)
    check_one_method(request)
    check_loading(request)
    check_optimizer(request.optimizers, request.optimizer_cls_and_kwargs, request.method, request.makes_models)
    check_formatting(request)
    check_losses(request)
    check_devices(request.args, request.source)
    check_fast_dropout(request.args)
    check_batches_can_be_joined(request.args)
    check_evaluation_loss(request.args, request.eval_dataset)
    check_best_metric(request.args, request.compute_metrics, request.eval_dataset)
    check_shrinking_data(request)
    check_task_ids(request)
    check_writable(Path(request.args.output_dir or ""))
    check_datasets(request)
    check_prompts(request)


def check_family(source: ModelSource, family: ModelFamily, trainer: str) -> None:
    """Refuse a model of the other family than that of the trainer's class."""
    if source.family != family:
        raise ValueError(
            f"{trainer} trains {family} models and model={source.title!r} is {source.family}: it would train on "
            "another objective than the model's. Use LeftTrainer, which chooses the right class by itself."
        )


def check_model_and_method(request: Request, needs_weights: bool = True) -> None:
    """What is wrong whatever the data: a field that the family ignores, precision, what the method cannot do."""
    request.args.check_family(request.source.family)
    check_no_adapter_inside(request.source)
    check_arguments(request.args)  # fields may have been set since
    check_precision(request.args, request.source.config)
    check_run_arguments(request.args, request.source, needs_weights)
    check_method(request)
    check_sharding(request)
    check_shrinking(request)


def check_no_adapter_inside(source: ModelSource) -> None:
    """Refuse adapters that stand in the model itself, where no `PeftModel` knows of them."""
    if not isinstance(source.model, PreTrainedModel):
        return
    layer = next((name for name, module in source.model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if layer is not None:
        raise ValueError(
            f"{source.title} has an adapter inside ({layer}), from model.add_adapter, load_adapter or a PeftModel, and "
            "it would be frozen under a new one. To train it further, save it, model.save_pretrained('adapter'), "
            "and pass the folder as model, or pass the PeftModel. To start anew, pass the model without it: "
            "model.delete_adapter(name), or the PeftModel's unload()."
        )


def check_one_method(request: Request) -> None:
    """Refuse a method, or options, beside an adapter or a config that would be used in their place."""
    args, config = request.args, request.peft_config or request.source.adapter
    if config is None:
        return
    asked, what = get_method(args.peft_method), "peft_config" if request.peft_config else "the adapter of the model"
    if request.names_method and not is_made_by(config, asked):
        raise ValueError(
            f"peft_method={asked.name!r} and {what}, a {type(config).__name__}, name different methods. Remove one of "
            "them."
        )
    ignored = {
        name: value
        for name, value in args.peft_options.items()
        # How an adapter starts (init_weights, eva_config, ...) is past in one that is trained further.
        if name not in asked.hook_options
        and not (name.startswith("init_") or name.endswith("_config"))
        and plain_options(getattr(config, name, None)) != plain_options(value)
    }
    if ignored:
        raise ValueError(
            f"peft_kwargs={ignored!r} would have no effect: {what} has its own options. Remove peft_kwargs, or "
            f"{'set them in peft_config' if request.peft_config else 'start from the model without the adapter'}."
        )


def check_loading(request: Request) -> None:
    """Refuse options of loading for a model that is loaded."""
    if not request.source.is_loaded:
        return
    of_weights = {
        name: value
        for name, value in (request.args.model_init_kwargs or {}).items()
        if name not in (*HUB_ARGUMENTS, "trust_remote_code")
    }
    for argument, value in (("model_init_kwargs", of_weights), ("quantization_config", request.quantization_config)):
        if value:
            raise ValueError(
                f"{argument}={value!r} has no effect on a model that is loaded already. Pass the model's name or path, "
                "or load it with these options."
            )


def check_formatting(request: Request) -> None:
    """Refuse `formatting_func` where nothing calls it."""
    if request.formatting_func is not None and request.source.family == "encoder_decoder":
        raise ValueError("formatting_func has no effect on an encoder-decoder model. Pass prompt/completion rows.")


def check_losses(request: Request) -> None:
    """Refuse two losses of which one would replace the other without a word; the same for both families."""
    args, method = request.args, request.method
    asked = {
        "compute_loss_func": request.compute_loss_func is not None,
        f"peft_method={args.peft_method!r}": method is not None and method.loss is not None,
        f"label_smoothing_factor={args.label_smoothing_factor:g}": args.label_smoothing_factor > 0,
        f"loss_type={args.loss_type!r}": args.loss_type != "nll",
    }
    asked["teacher_model, whose loss has the task's in it,"] = request.is_taught
    given = [name for name, is_given in asked.items() if is_given]
    if len(given) > 1:
        raise ValueError(
            f"{given[0]} and {given[1]} each define the loss, and only one of them would be used. Remove one of them."
        )


def check_evaluation_loss(args: LeftTrainingArguments, eval_dataset: Any) -> None:
    """Refuse `eval_loss_with_generation=False` where nothing is generated, or where the loss picks the best model."""
    if args.eval_loss_with_generation:
        return
    if not args.predict_with_generate:
        raise ValueError(
            "eval_loss_with_generation=False needs predict_with_generate=True: otherwise an evaluation has nothing to "
            "compute. Remove it, or set predict_with_generate=True."
        )
    names = [f"{name}_loss" for name in eval_dataset] if isinstance(eval_dataset, dict) else ["loss"]
    if (args.metric_for_best_model or "").removeprefix("eval_") in names:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} (what load_best_model_at_end=True uses unless told "
            "otherwise) is not computed with eval_loss_with_generation=False. Remove that, or name another metric, for "
            "example metric_for_best_model='rougeL'."
        )


def check_method(request: Request) -> None:
    """Refuse what the method declares impossible, and missing packages."""
    method, args, family = request.method, request.args, request.source.family
    if method is None:
        return
    check_packages(method)
    asked: dict[Feature, tuple[bool, str, str]] = {
        family: (True, f"{ARTICLES[family]} {family} model", "choose another"),
        "gradient_checkpointing": (
            bool(args.gradient_checkpointing),
            "gradient_checkpointing=True",
            "set gradient_checkpointing=False, or choose another",
        ),
        "packing": (args.packing, "packing=True", "set packing=False, or choose another"),
        "quantized_base": (request.is_quantized, "a quantized base model", "load it unquantized, or choose another"),
        "sharded": (shards_weights(args), *SHARDED),
    }
    for feature, (is_asked, what, fix) in asked.items():
        if is_asked and not method.supports(feature):
            raise ValueError(
                f"{what} does not work with peft_method={method.name!r}: {method.unsupported[feature]} "
                f"{fix[0].upper()}{fix[1:]} method; `left-trainer methods` lists them."
            )


def check_task_ids(request: Request) -> None:
    """Refuse several tasks without a column that says which row belongs to which."""
    method, dataset = request.method, request.train_dataset
    if method is None or number_of_tasks({**method.defaults, **request.args.peft_options}) <= 1:
        return
    if request.source.family == "decoder_only":
        raise ValueError(
            f"peft_method={method.name!r} with several tasks needs task_ids in every batch, and TRL's collator for "
            "decoder-only models drops them. Use an encoder-decoder model, or one task."
        )
    if dataset is not None and TASK_IDS not in next(iter(dataset)):
        raise ValueError(
            f"peft_method={method.name!r} with several tasks needs to know the task of each row. Add a column "
            f"{TASK_IDS!r} of integers, counted from 0, to train_dataset, or leave the number of tasks at 1."
        )


def check_datasets(request: Request) -> None:
    """Refuse rows of no known form. With `formatting_func` any row may become one."""
    if request.formatting_func is not None:
        return
    for argument, dataset in named_datasets(request.train_dataset, request.eval_dataset).items():
        dataset_form(dataset, request.source.family, argument, request.args.dataset_text_field)


def check_prompts(request: Request) -> None:
    """Refuse evaluation rows in which nothing tells a decoder-only model where to begin with its answer."""
    args = request.args
    if not args.predict_with_generate or request.source.family == "encoder_decoder":
        return
    for argument, dataset in named_datasets(None, request.eval_dataset).items():
        reason = why_no_prompt(request, dataset)
        if reason:
            raise ValueError(
                f"predict_with_generate=True needs to know where each prompt ends, and {argument} does not say it: "
                f"{reason}. Pass rows with 'prompt' and 'completion', or set predict_with_generate=False."
            )


def why_no_prompt(request: Request, dataset: AnyDataset) -> str | None:
    """Why nothing tells where the prompts of `dataset` end; `None` where something does."""
    args, first = request.args, next(iter(dataset))
    if request.formatting_func is not None:
        return "formatting_func makes one text of each row"
    if "input_ids" in first:
        labels = first.get("labels")
        covers_prompt = labels is None and not set(MASKS) & set(first)
        return "its labels cover the whole text" if covers_prompt or (labels and labels[0] != IGNORE_INDEX) else None
    if "prompt" not in first:
        has_turns = args.assistant_only_loss and args.dataset_text_field not in first
        return None if has_turns else "its rows are whole texts"
    trains_on_text = request.train_dataset is not None and "completion" not in next(iter(request.train_dataset))
    covers_prompt = trains_on_text if args.completion_only_loss is None else not args.completion_only_loss
    return "the loss covers the prompts (completion_only_loss)" if covers_prompt else None


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, request: Request) -> None:
    """Give the tokenizer the pad token of the arguments, and raise when it lacks one."""
    args = request.args
    pads_itself = request.data_collator is not None and request.rows_are_tokens and not args.predict_with_generate
    if args.pad_token is not None:
        if args.pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"pad_token={args.pad_token!r} is not in the tokenizer's vocabulary. Pass a token that is."
            )
        tokenizer.pad_token = args.pad_token
    if tokenizer.pad_token_id is None and not pads_itself:
        raise ValueError(
            "processing_class has no pad token, so rows of different lengths cannot form a batch. Set one, for example "
            f"tokenizer.pad_token = {tokenizer.eos_token!r} in Python, or --pad_token {tokenizer.eos_token!r} on the "
            "command line."
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise when the tokenizer has more tokens than the model has embeddings."""
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"processing_class has {len(tokenizer)} tokens and the model's vocabulary {vocab_size}: tokens beyond it "
            "have no embedding. Pass the tokenizer that belongs to the model, or call "
            f"model.resize_token_embeddings({len(tokenizer)}) before training."
        )


def check_text_tokenizer(request: Request, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that would make wrong targets of the rows that hold text."""
    for dataset in named_datasets(request.train_dataset, request.eval_dataset).values():
        if "input_ids" in next(iter(dataset)):
            continue
        if request.source.family == "encoder_decoder":
            check_languages(tokenizer)
        elif tokenizer.eos_token is None and request.args.eos_token is None:
            raise ValueError(
                "processing_class has no end-of-sequence token, so the model would not learn to stop. Set one that the "
                "model knows, for example tokenizer.eos_token = '</s>' in Python, or --eos_token '</s>'."
            )


def check_fits(dataset: Any, free_positions: Limits, argument: str) -> None:
    """Refuse rows that were given as tokens and are longer than an encoder-decoder model has positions.

    Tokens are not cut: only who made them knows where. Rows that are streamed, or computed when they are read, are not
    looked at.
    """
    if not isinstance(dataset, Dataset) or is_lazy(dataset):
        return
    given = dict(zip(("input_ids", "labels"), free_positions, strict=True))
    bounds = {name: limit for name, limit in given.items() if limit and set(given) <= set(dataset.column_names)}
    for name, limit in bounds.items():
        lengths = row_lengths(dataset, [name])
        n_longer = int((lengths > limit).sum())
        if n_longer:
            raise ValueError(
                f"{n_longer} of {len(lengths)} rows of {argument} have more than {limit} {name}, the positions of the "
                "model less those that the method takes. Tokenize with truncation=True and "
                f"max_length={limit}."
            )
