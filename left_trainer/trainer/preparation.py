"""From what a user asks for to the model, the tokenizer and the arguments that a trainer is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from left_trainer.compression.teacher import Teacher
from left_trainer.compression.vocabulary import TrimmedVocabulary, trim_model
from left_trainer.compression_options import VOCABULARY
from left_trainer.data.features import first_row_ids, named_datasets
from left_trainer.kernels.output_head import has_adapter
from left_trainer.methods import PeftMethod, get_method
from left_trainer.methods.apply import apply_built, apply_config, build_config, is_made_by, method_name
from left_trainer.methods.patterns import check_patterns
from left_trainer.methods.registry import METHODS
from left_trainer.methods.saving import adapter_method, load_trained
from left_trainer.methods.trial import check_shapes
from left_trainer.methods.virtual_tokens import Positions
from left_trainer.models import ModelFamily, ModelSource, build_skeleton, load_model, load_tokenizer, without_adapter
from left_trainer.models.languages import generate_in_target_language
from left_trainer.models.positions import Limits, position_limits
from left_trainer.trainer.checks import Request, check_fits, check_text_tokenizer, check_tokenizer, check_vocabulary
from left_trainer.trainer.device_checks import check_one_replica
from left_trainer.trainer.generation import completed_generation_config
from left_trainer.trainer.guarded import check_folder_free_for
from left_trainer.trainer.lesson_checks import check_lessons
from left_trainer.trainer.pushing import check_may_push
from left_trainer.trainer.teacher_checks import check_teacher
from left_trainer.trainer.vocabulary import (
    has_students_vocabulary,
    request_to_plan,
    tell_size,
    with_students_tokens,
    with_trimmed_vocabulary,
)
from left_trainer.training_args import LeftTrainingArguments

if TYPE_CHECKING:
    from left_trainer.planning.planned_run import PlannedRun

MIN_TOKENS = 2  # one to read or write, and the end of the sequence
LearningRateSource = Literal["given", "default"]


@dataclass(frozen=True)
class Preparation:
    """What a trainer is made of.

    Args:
        model: Loaded and wrapped.
        tokenizer: Given, or the one saved with the model; `None` where there is none and none is needed.
        args: With what the user left open.
        learning_rate_source: Where the learning rate comes from.
        free_positions: Of the model, less those that the method takes.
        planned: What the run was planned to need, where that was asked for.
        teacher: Loaded, where there is one.
        vocabulary: What is left of it, where it is trimmed.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase | None
    args: LeftTrainingArguments
    learning_rate_source: LearningRateSource
    free_positions: Limits
    planned: PlannedRun | None = None
    teacher: Teacher | None = None
    vocabulary: TrimmedVocabulary | None = None


def prepare(
    request: Request, tokenizer: PreTrainedTokenizerBase | None, vocabulary: TrimmedVocabulary | None = None
) -> Preparation:
    """Load tokenizer and model, apply the method, and decide what the user left open.

    Args:
        request: Checked.
        tokenizer: By default the one saved with the model.
        vocabulary: What is left of it, where `tokenizer` was trimmed already.

    Raises:
        ValueError: A tokenizer that cannot be used, or as `prepare_model`.
        FolderInUseError: Another process trains in `output_dir`.
    """
    check_folder_free_for(request.args)
    check_may_push(request.args)
    tokenizer = tokenizer or _own_tokenizer(request)
    if tokenizer is not None:
        check_tokenizer(tokenizer, request)
        if request.source.adapter is None:
            check_vocabulary(tokenizer, request.source.config.get_text_config().vocab_size)
        check_text_tokenizer(request, tokenizer)
    teachers_tokenizer = check_teacher(request, tokenizer)
    check_lessons(request, tokenizer, teachers_tokenizer)
    if vocabulary is None and VOCABULARY in request.args.target_size:
        request, vocabulary = with_trimmed_vocabulary(request, tokenizer)
        tokenizer = vocabulary.tokenizer
        teachers_tokenizer = tokenizer if has_students_vocabulary(request) else teachers_tokenizer
    source, args, method = request.source, request.args, request.method
    options = options_from_data(request, tokenizer)
    free = free_positions(request, options)
    if source.family == "encoder_decoder":
        for argument, dataset in named_datasets(request.train_dataset, request.eval_dataset).items():
            check_fits(dataset, free, argument)
    planned = _announced(request_to_plan(request, vocabulary), tokenizer)
    model, vocabulary = prepare_model(request, options, vocabulary)
    check_one_replica(args, model)
    teacher = None
    if request.teacher is not None:
        teacher = Teacher.of(request.teacher, model, args.distillation, teachers_tokenizer)
        teacher = with_students_tokens(teacher, request, vocabulary)
    if tokenizer is not None and source.adapter is not None:  # which may bring embeddings of further tokens
        check_vocabulary(tokenizer, without_adapter(model).get_input_embeddings().weight.shape[0])
    if isinstance(model, PeftModel) and source.base_options.get("revision"):
        model.active_peft_config.revision = source.base_options["revision"]
    if source.family == "encoder_decoder" and tokenizer is not None:
        generate_in_target_language(without_adapter(model), tokenizer)
    rate, rate_source = choose_learning_rate(args, method, source)
    generation_config = completed_generation_config(model, args.generation_config)
    resolved = {"peft_kwargs": options, "learning_rate": rate, "generation_config": generation_config}
    if counts_prefixes_as_routed(request):
        resolved["router_aux_loss_coef"] = 0.0
    if args.predict_with_generate and args.packing and args.eval_packing is None:
        resolved["eval_packing"] = False  # prompts are generated from one by one
    return Preparation(model, tokenizer, args.replaced(**resolved), rate_source, free, planned, teacher, vocabulary)


def _announced(request: Request, tokenizer: PreTrainedTokenizerBase | None) -> PlannedRun | None:
    """What the run will need, said before weights are loaded."""
    if not request.args.report_plan:
        return None
    from left_trainer import announce_plan  # late: a plan rehearses the trainer, so that planning stands above it

    return announce_plan(request, tokenizer)


def free_positions(request: Request, options: Mapping[str, Any]) -> Limits:
    """The model's positions, less those that the method takes.

    Args:
        request: What the user asks for.
        options: Of the method; those of an explicit config, or of the model's adapter, beat them.

    Raises:
        ValueError: None are left.
    """
    source, method, config = request.source, request.method, request.peft_config or request.source.adapter
    taken = method.positions(config.to_dict() if config else options, source.family) if method else Positions()
    used = (taken.source, taken.source if source.family == "decoder_only" else taken.target)
    positions = position_limits(source.config)
    free = Limits(*(limit and limit - number for limit, number in zip(positions, used, strict=True)))
    if any(limit is not None and limit < MIN_TOKENS for limit in free):
        raise ValueError(
            f"peft_method={request.args.peft_method!r} takes {max(used)} positions, and model={source.title!r} has "
            f"{min(filter(None, positions))}, which leaves none for a text. Lower num_virtual_tokens."
        )
    return free


def counts_prefixes_as_routed(request: Request) -> bool:
    """Whether the loss for the balance of experts would count virtual tokens that no router has seen.

    Keys and values in the cache of the decoder make the attention mask longer than what the routers see, and
    transformers' `load_balancing_loss_func` takes both to be equal (transformers 5.23).

    Raises `ValueError` where the user asks for that loss.
    """
    args, method = request.args, request.method
    is_mixture = hasattr(request.source.config.get_text_config(decoder=True), "output_router_logits")
    virtual = method.virtual_tokens if method else None
    if not is_mixture or request.source.family != "decoder_only" or not virtual or virtual.place != "decoder_cache":
        return False
    if args.router_aux_loss_coef:
        raise ValueError(
            f"router_aux_loss_coef={args.router_aux_loss_coef:g} does not work with peft_method={args.peft_method!r}: "
            "the loss that balances experts would count virtual tokens, which no router sees. Remove it or set it to 0."
        )
    return True


def method_of(source: ModelSource, args: LeftTrainingArguments, peft_config: PeftConfig | None) -> PeftMethod | None:
    """The record of what will be trained; `None` for an explicit config whose type has none.

    An explicit config beats an adapter that the model carries, which beats `args.peft_method`, unless that names a
    preset of the same config: LoRA+ trains a LoRA. An adapter that was trained on a quantized base stays on one.
    """
    noted = adapter_method(source) if peft_config is None else None
    if noted is not None and noted.quantization is not None:
        return noted
    config, asked = peft_config or source.adapter, get_method(args.peft_method)
    if config is None or is_made_by(config, asked):
        return asked
    return METHODS.find(method_name(config))


def choose_learning_rate(
    args: LeftTrainingArguments, method: PeftMethod | None, source: ModelSource
) -> tuple[float, LearningRateSource]:
    """The user's learning rate, or the method's default for this model."""
    if args.learning_rate is not None:
        return args.learning_rate, "given"
    return (method or get_method("lora")).default_learning_rate(source.width), "default"


def _own_tokenizer(request: Request) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with the model; `None` where there is none and the user's collator takes rows of tokens."""
    try:
        return load_tokenizer(request.source)
    except ValueError:
        if request.data_collator is None or not request.rows_are_tokens or request.args.predict_with_generate:
            raise
        return None


def tokenizer_without_tokens(family: ModelFamily) -> PreTrainedTokenizerBase | None:
    """What Hugging Face's constructor takes where there is no tokenizer: TRL asks for one, and tokenizes nothing."""
    if family == "encoder_decoder":
        return None
    unknown = "[UNK]"
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({unknown: 0}, unk_token=unknown)))


def options_from_data(request: Request, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """The user's options, with those that the method takes from the first training row."""
    args, method, dataset = request.args, request.method, request.train_dataset
    options = args.peft_options
    if method is None or method.derive_from_data is None or dataset is None:
        return options
    ids = first_row_ids(dataset, tokenizer, args.dataset_text_field)
    return {**method.derive_from_data(tokenizer, ids), **options}


def prepare_model(
    request: Request, options: Mapping[str, Any], vocabulary: TrimmedVocabulary | None = None
) -> tuple[PreTrainedModel | PeftModel, TrimmedVocabulary | None]:
    """Load the model if it is a name or path, and apply the method unless it already carries an adapter.

    Args:
        request: What the user asks for.
        options: Of the method.
        vocabulary: To trim the model to, before the method is applied.

    Returns:
        The model, and `vocabulary` with its sizes.

    Raises:
        ValueError: A module pattern that matches nothing or a method that does not fit the model (before weights are
            loaded, where the model is a name or path), an adapter together with `peft_config`, an adapter without a
            trainable parameter, or a loaded model without the quantization that the method needs.
    """
    source, seed = request.source, request.args.seed
    if source.adapter is not None:
        return _with_its_adapter(request), None
    method, config = request.method, request.peft_config
    shape = source.model if source.is_loaded else build_skeleton(source)
    if config is None:
        asked = get_method(request.args.peft_method)
        config = build_config(shape, asked, options, source.family)
        _check_quantization(request, asked)
    if config is not None:
        check_patterns(shape, config)
        if not source.is_loaded:
            check_shapes(shape, config, request.args.peft_method)
    model = source.model if source.is_loaded else load_model(source, quantization_config=_quantization(request))
    if vocabulary is not None:
        vocabulary = trim_model(model, vocabulary)
        tell_size(vocabulary, request.args)
    if request.peft_config is not None:
        name = method.name if method else None
        return apply_config(model, request.peft_config, seed=seed, name=name), vocabulary
    return apply_built(model, get_method(request.args.peft_method), config, seed), vocabulary


def _with_its_adapter(request: Request) -> PeftModel:
    """The model with the adapter that it came with, which is trained further."""
    source = request.source
    if request.peft_config is not None:
        raise ValueError(
            "model is a PeftModel and peft_config is given too. Pass the PeftModel alone to train its adapter "
            "further, or its base model, model.unload(), with the new config."
        )
    if isinstance(source.model, str):
        return load_trained(source, quantization_config=request.quantization_config)
    if not any(parameter.requires_grad for parameter in source.model.parameters()):
        raise ValueError(
            "model is a PeftModel without a trainable parameter. Load it for training: "
            "PeftModel.from_pretrained(base, path, is_trainable=True)."
        )
    layers = [module for module in source.model.modules() if isinstance(module, BaseTunerLayer)]
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ValueError(
            f"model is a PeftModel with the adapter {merged[0]!r} merged into its weights: its layers call none, and "
            "nothing would be trained. Take it out again with model.unmerge_adapter(), or pass "
            "model.merge_and_unload() to train a new adapter on the merged weights."
        )
    return source.model


def _quantization(request: Request) -> Any:
    """The user's config, else the one that the method needs, unless the base is quantized already."""
    method = get_method(request.args.peft_method)
    if request.quantization_config is None and method.quantization and not request.source.is_quantized:
        return method.quantization()
    return request.quantization_config


def _check_quantization(request: Request, method: PeftMethod) -> None:
    if method.quantization and request.source.is_loaded and not request.source.is_quantized:
        raise ValueError(
            f"peft_method={method.name!r} needs a quantized base, and the {request.source.title} given is not. "
            "Pass its name or path, which is then loaded in 4 bits, or load it with a quantization_config."
        )


@contextlib.contextmanager
def without_adapter_on_head(model: PreTrainedModel | PeftModel, loss_type: str) -> Iterator[None]:
    """Inside, TRL's constructor may see `model`: it refuses an adapter on the output head, which its loss would ignore.

    Tied embeddings with trainable tokens have one. Ours calls the head where there is an adapter.

    Raises:
        ValueError: A loss that TRL computes.
    """
    base = without_adapter(model)
    head = base.get_output_embeddings()
    if base.config.is_encoder_decoder or not has_adapter(head):
        yield
        return
    if loss_type != "nll":
        raise ValueError(
            f"loss_type={loss_type!r} reads the weight of the output head and would not train the adapter on it. Use "
            "loss_type='nll', or leave the output head out of the adapter."
        )
    plain = nn.Linear(1, 1, bias=False, device="meta")
    base.get_output_embeddings = lambda: plain
    try:
        yield
    finally:
        del base.get_output_embeddings


@contextlib.contextmanager
def unrounded_adapter(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside, a trainer may be made of `model`; afterwards its trained parameters are what they were.

    TRL rounds the adapter of a quantized model to bfloat16, whatever precision the run asks for (trl 1.16).
    """
    trained = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in trained and parameter.dtype != trained[name].dtype:
            parameter.data = trained[name].to(parameter.device)
