"""`model_init`: a model for each training, and for each trial of a search over arguments and options of the method."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import number_of_arguments
from trl.trainer.utils import add_fused_lm_head

from left_trainer.compression.vocabulary import TrimmedVocabulary
from left_trainer.methods import get_method
from left_trainer.methods.options import check_peft_kwargs, known_options, parse_peft_kwargs
from left_trainer.models import ModelSource, without_adapter
from left_trainer.registry import did_you_mean
from left_trainer.trainer.checks import Request, check_model_and_method
from left_trainer.trainer.kept_answers import keep_answers
from left_trainer.trainer.preparation import Preparation, choose_learning_rate, method_of, prepare
from left_trainer.training_args import LeftTrainingArguments, loading_options

# What TRL's constructor does to the model that it gets (trl 1.16).
FUSED_OUTPUTS = ("log_probs", "entropy", "is_top1")


class FreshModelHost(Protocol):
    """What a fresh model needs of the trainer that it is for."""

    args: LeftTrainingArguments
    request: Request
    processing_class: Any
    vocabulary: TrimmedVocabulary | None
    model: Any
    place_model_on_device: bool
    starts_anew: bool
    callbacks_of_method: list[TrainerCallback]
    hp_search_backend: Any
    hp_space: Callable[[Any], dict[str, Any]]
    _signature_columns: list[str] | None

    def take_over(self, request: Request, ready: Preparation) -> None: ...

    def initialize_method(self) -> None: ...

    def add_callback(self, callback: TrainerCallback) -> None: ...

    def remove_callback(self, callback: TrainerCallback) -> None: ...


def first_source(model: Any, model_init: Callable[..., Any] | None, args: TrainingArguments) -> ModelSource:
    """What is known of `model`, or of what `model_init` makes where there is none. The seed is set before that.

    Raises:
        ValueError: Both are given.
    """
    if model_init is not None:
        if model is not None:
            raise ValueError("model and model_init are both given. Pass one of them.")
        set_seed(args.seed)
        model = model_init() if number_of_arguments(model_init) == 0 else model_init(None)
    return ModelSource.of(model, loading_options(args))


def with_method_options(values: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """What a trial sets of the arguments: options of the method become `peft_kwargs`.

    Args:
        values: What the user's `hp_space` returned: fields of the arguments, `peft_kwargs` as a mapping, or options of
            the method by their own names.
        request: What the user asks for outside of the search.

    Raises:
        ValueError: A name that is neither a field of the arguments nor an option of the method, or options together
            with an explicit `peft_config`.
    """
    args = request.args
    method = get_method(values.get("peft_method", args.peft_method))
    fields, options = set(inspect.signature(type(args)).parameters), known_options(method)
    by_name = {name: value for name, value in values.items() if name not in fields}
    for name in by_name:
        if name not in options:
            raise ValueError(
                f"hp_space returned {name!r}, which is neither a field of LeftTrainingArguments nor an option of "
                f"peft_method={method.name!r}.{did_you_mean(name, [*fields, *options])} Rename it."
            )
    arguments = {name: value for name, value in values.items() if name in fields}
    searched = {**parse_peft_kwargs(arguments.pop("peft_kwargs", None)), **by_name}
    if request.peft_config is not None and (searched or "peft_method" in values):
        raise ValueError(
            "hp_space varies the method, and peft_config fixes it. Remove peft_config and pass peft_method and "
            "peft_kwargs."
        )
    if request.peft_config is None:
        kept = {name: value for name, value in args.peft_options.items() if name in options}
        arguments |= {"peft_method": method.name, "peft_kwargs": check_peft_kwargs(method, {**kept, **searched})}
        if "learning_rate" not in values:
            arguments["learning_rate"] = choose_learning_rate(args, method, request.source)[0]
    return arguments


def prepare_fresh_model(trainer: FreshModelHost, model: Any, trial: Any) -> Any:
    """`model`, which `model_init` has made, with the method that the arguments or the trial of a search ask for."""
    values = _values_of_trial(trial, trainer.hp_space) if trainer.hp_search_backend and trial is not None else {}
    chosen = {name: values[name] for name in ("peft_method", "peft_kwargs", "learning_rate") if name in values}
    source, args = ModelSource.of(model, loading_options(trainer.args)), trainer.args.replaced(**chosen)
    method = method_of(source, args, trainer.request.peft_config)
    request = dataclasses.replace(trainer.request, source=source, args=args, method=method)
    check_model_and_method(request)
    for callback in trainer.callbacks_of_method:
        trainer.remove_callback(callback)
    ready = prepare(request, trainer.processing_class, trainer.vocabulary)
    trainer.take_over(request, ready)
    if source.family == "decoder_only":
        add_fused_lm_head(without_adapter(ready.model), outputs=FUSED_OUTPUTS)
    for callback in trainer.callbacks_of_method:
        trainer.add_callback(callback)
    trainer._signature_columns = None  # those of the last method
    trainer.model = ready.model.to(args.device) if trainer.place_model_on_device else ready.model
    keep_answers(trainer)
    if trainer.starts_anew:
        trainer.initialize_method()
    return trainer.model


def _values_of_trial(trial: Any, hp_space: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What a trial sets. Optuna is asked through `hp_space`; the other backends hand over the values themselves."""
    return hp_space(trial) if hasattr(trial, "suggest_float") else dict(trial)
