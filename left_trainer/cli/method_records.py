"""Data of `left-trainer methods`: the record of a method as plain data, and its trainable parameters on a model."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from left_trainer.callbacks.trainable_parameters import count_parameters
from left_trainer.embedded import MODEL_NAMES, MODEL_PATHS
from left_trainer.export.formats import formats_of
from left_trainer.methods import PeftMethod, apply_method
from left_trainer.methods.apply import apply_config, build_config, check_model
from left_trainer.methods.learning_rates import NARROW, SWEEP, WIDE, format_rate
from left_trainer.methods.plain_lora import Kind, lora_kind
from left_trainer.models import ModelSource, auto_class, build_skeleton

# If the meta device is not enough, a model with weights is built, unless it has more parameters than this.
LARGEST_BUILT = 10_000_000


@dataclass(frozen=True)
class Trainable:
    """How many parameters a method trains.

    Args:
        model: Name of the model.
        count: Trainable parameters; `None` if the model's config is not enough to count them.
        percent: Their share of all parameters, including those of the adapter.
        note: What is needed for a count, if there is none.
        plain_lora: How the adapter can be written as a plain LoRA; `None` where it cannot, or could not be applied.
    """

    model: str
    count: int | None = None
    percent: float | None = None
    note: str = ""
    plain_lora: Kind | None = None


class CountingModel:
    """A model built from its config only, to which methods are applied without loading weights.

    Args:
        name: `embedded/t5`, `embedded/llama`, or a hub name or path.

    Raises:
        ValueError: The model does not exist, or does not generate text.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.source = ModelSource.of(name)
        self.skeleton = build_skeleton(self.source)

    def count(self, method: PeftMethod) -> Trainable:
        """Count what `method` trains with its defaults.

        Raises:
            ValueError: The method does not work on this model, or needs an option to do so.
        """
        check_model(self.skeleton, method, self.source.family)
        if self.source.is_quantized and not method.supports("quantized_base"):
            raise ValueError(f"{self.name} is quantized: {method.unsupported['quantized_base']}")
        if method.required:
            return Trainable(self.name, note=f"needs {next(iter(method.required))}")
        if method.quantization:
            method = replace(method, requires={})  # the adapter has the same size on unquantized weights
        try:
            return self._on_meta_device(method) or self._on_weights(method)
        except ImportError:
            return Trainable(self.name, note=f"needs {', '.join(method.requires.values())}")
        except (AttributeError, KeyError, TypeError) as error:  # an architecture that PEFT does not expect
            raise ValueError(f"peft_method={method.name!r} cannot be applied to {self.name}: {error}") from error

    def _on_meta_device(self, method: PeftMethod) -> Trainable | None:
        try:
            with torch.device("meta"):
                return self._wrapped(build_skeleton(self.source), method)
        except RuntimeError:
            return None  # the method reads weights when wrapping: a decomposition, a choice by magnitude

    def _on_weights(self, method: PeftMethod) -> Trainable:
        if sum(parameter.numel() for parameter in self.skeleton.parameters()) > LARGEST_BUILT:
            return Trainable(self.name, note="needs the weights")
        with single_thread():
            return self._wrapped(auto_class(self.source.family).from_config(self.source.config), method)

    def _wrapped(self, model: PreTrainedModel, method: PeftMethod) -> Trainable:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warnings concern training
            config = build_config(model, method, {}, self.source.family)
            wrapped = apply_config(model, config) if config else apply_method(model, method.name)
        count = count_parameters(wrapped)
        return Trainable(self.name, count.trainable, count.percent, plain_lora=lora_kind(wrapped) if config else None)


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Use one thread: decompositions of small matrices take seconds with several threads, and no time with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def default_model(method: PeftMethod) -> str:
    """The embedded model that `method` is counted on: the default one if the method works on its family."""
    names = {path: name for name, path in MODEL_NAMES.items()}
    return names[str(MODEL_PATHS[method.model_families[0]])]


def counting_models(name: str | None) -> Mapping[str, CountingModel]:
    """The model called `name`, or the embedded ones."""
    return {each: CountingModel(each) for each in ([name] if name else MODEL_NAMES)}


def record_of(method: PeftMethod, trainable: Trainable, width: int | None) -> dict[str, Any]:
    """`method` as plain data: description, options, and whether it has its own hooks.

    Args:
        method: The record.
        trainable: What it trains in a model.
        width: Of that model.
    """
    copied = ("name", "aliases", "family", "summary", "paper", "equation", "when_to_use")
    rate = ("learning_rate", "learning_rate_source", "narrow_learning_rate")
    options = ("defaults", "preset", "required", "hook_options", "unsupported", "requires")
    return {
        **{name: getattr(method, name) for name in (*copied, *rate)},
        "config_class": method.config_class.__name__ if method.config_class else None,
        **{name: dict(getattr(method, name)) for name in options},
        "model_families": method.model_families,
        "mergeable": method.mergeable,
        "plain_lora": trainable.plain_lora,
        "exports": formats_of(method, trainable.plain_lora),
        "sharded": method.supports("sharded"),
        "quantizes_base": method.quantization is not None,
        "has_own_optimizer": method.optimizer is not None,
        "has_own_initialization": method.initialize is not None,
        "has_own_callback": method.callback is not None,
        "has_own_loss": method.loss is not None or method.penalty is not None,
        "model": trainable.model,
        "learning_rate_on_model": method.default_learning_rate(width),
        "trainable_parameters": trainable.count,
        "trainable_percent": trainable.percent,
        "trainable_note": trainable.note,
    }


def learning_rate_text(method: PeftMethod) -> str:
    """The default learning rates of `method`, and where they come from."""
    wide = f"{format_rate(method.learning_rate)} for models at least {WIDE} wide ({method.learning_rate_source})"
    if method.narrow_learning_rate is None:
        return f"{format_rate(method.learning_rate)} ({method.learning_rate_source})"
    narrow = f"{format_rate(method.narrow_learning_rate)} for models at most {NARROW} wide ({SWEEP})"
    return f"{wide}; {narrow}; in between, a power of the width"


def short_paper(paper: str) -> str:
    """Authors and year: `Hu et al., 2021`."""
    found = re.match(r"\D+\d{4}", paper)
    return found[0] if found else paper
