"""Apply a method to a model: build its PEFT config, resolve and check its targets, wrap the model."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType
from transformers import PreTrainedModel

from left_trainer.methods.input_prompts import wrap
from left_trainer.methods.method import Feature, PeftMethod
from left_trainer.methods.options import check_peft_kwargs, check_required, option_types, with_nested_configs
from left_trainer.methods.patterns import check_patterns, known_modules, patterns_of, text_of
from left_trainer.methods.registry import METHODS, get_method, list_methods
from left_trainer.methods.targets import count_matches, is_conv1d, peft_targets
from left_trainer.models import ModelFamily, model_family, without_upstream_warnings
from left_trainer.models.tables import unread_tables

TASK_TYPES: dict[ModelFamily, TaskType] = {
    "encoder_decoder": TaskType.SEQ_2_SEQ_LM,
    "decoder_only": TaskType.CAUSAL_LM,
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AppliedMethod:
    """What `apply_method` did; the wrapped model carries it as `model.applied_method`.

    Args:
        name: The method's name, or PEFT's type name where an explicit config has no record.
        matched_modules: Full name of every module that the method replaced; empty for soft prompts and full
            fine-tuning, which replace none.
        match_table: For each pattern of the config, how many modules it matched.
    """

    name: str
    matched_modules: tuple[str, ...]
    match_table: Mapping[str, int]


def apply_method(
    model: PreTrainedModel,
    name: str,
    peft_kwargs: str | Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> PeftModel | PreTrainedModel:
    """Wrap `model` with the method called `name`.

    Args:
        model: An encoder-decoder or decoder-only model; its own parameters are frozen in place.
        name: A name that `left-trainer methods` lists.
        peft_kwargs: Options of the method's PEFT config: a mapping, JSON, or `r=16,lora_alpha=32`.
        seed: Makes the adapter's initialisation repeatable, and equal to that of `get_peft_model` called after
            `torch.manual_seed(seed)`. The random state of the caller is left as it was.

    Returns:
        A `PeftModel`, or `model` itself for `full`; its attribute `applied_method` says what was matched.

    Raises:
        ValueError: Unknown name or option, an option of the wrong type, a module pattern that matches nothing, or no
            trainable parameter.
    """
    method = get_method(name)
    config = build_config(model, method, check_peft_kwargs(method, peft_kwargs))
    return apply_built(model, method, config, seed)


def apply_built(
    model: PreTrainedModel, method: PeftMethod, config: PeftConfig | None, seed: int | None = None
) -> PeftModel | PreTrainedModel:
    """As `apply_method`, with the config that `build_config` has made, of this model or of one of the same shape."""
    if config is None:
        return _train_everything(model, method)
    for setting, value in method.model_config.items():
        setattr(model.config, setting, value)
    return apply_config(model, config, seed=seed, name=method.name)


def build_config(
    model: PreTrainedModel, method: PeftMethod, options: Mapping[str, Any], family: ModelFamily | None = None
) -> PeftConfig | None:
    """`method`'s PEFT config for `model`: the record's defaults, what the shape dictates, then the user's options.

    Args:
        model: May be on the meta device.
        method: The record.
        options: The user's, as `check_peft_kwargs` returns them.
        family: Of the model, where it is known.

    Returns:
        `None` for a method without a config.

    Raises:
        ValueError: As `apply_method`.
    """
    family = family or model_family(model)
    check_model(model, method, family)
    check_required(method, {**method.defaults, **options})
    check_packages(method)
    if method.config_class is None:
        return None
    known = option_types(method.config_class)
    fixed = {**method.defaults, **{name: value for name, value in options.items() if name in known}, **method.preset}
    if "fan_in_fan_out" in known and is_conv1d(model):
        fixed["fan_in_fan_out"] = True
    with without_upstream_warnings():
        try:
            config = method.config_class(task_type=TASK_TYPES[family], **with_nested_configs(fixed, known))
        except (ValueError, TypeError) as error:
            raise ValueError(f"peft_kwargs of peft_method={method.name!r} do not go together: {error}") from error
    if method.resolve_targets and not _has_targets(config, model):
        targets = method.resolve_targets(model)
        if targets is not None and not targets:
            raise ValueError(
                f"peft_method={method.name!r} has no default target modules for model type "
                f"{model.config.model_type!r}. Name them: peft_kwargs={{'target_modules': [...]}}. "
                f"{known_modules(model)}"
            )
        for option, value in (targets or {}).items():
            setattr(config, option, set(value))
    for option, value in (method.derive(model, config) if method.derive else {}).items():
        if option not in options:
            setattr(config, option, value)
    return config


def check_packages(method: PeftMethod) -> None:
    """Raise `ImportError`, with what to install, when a package that only this method needs is missing."""
    for module, package in method.requires.items():
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"peft_method={method.name!r} needs {package}: pip install {package}")


def check_model(model: PreTrainedModel, method: PeftMethod, family: ModelFamily) -> None:
    """Raise `ValueError`, with the reason, when `method` does not work on this kind of model."""
    kinds: dict[Feature, bool] = {family: True, "conv1d": is_conv1d(model)}
    for kind, applies in kinds.items():
        if applies and not method.supports(kind):
            raise ValueError(
                f"peft_method={method.name!r} does not work on {type(model).__name__}: {method.unsupported[kind]} "
                "Choose another method; `left-trainer methods` lists them."
            )


def _has_targets(config: PeftConfig, model: PreTrainedModel) -> bool:
    """Whether the user or PEFT itself knows the target modules of this model type."""
    return config.target_modules is not None or peft_targets(model, config) is not None


def with_named_targets(model: PreTrainedModel, config: PeftConfig) -> PeftConfig:
    """`config` with PEFT's default target modules by name: for Mixtral PEFT looks them up too late (peft 0.21)."""
    if isinstance(config, LoraConfig) and not (config.target_modules or config.target_parameters):
        defaults = peft_targets(model, config)
        config.target_modules = set(defaults) if isinstance(defaults, list) else defaults
    return config


def apply_config(
    model: PreTrainedModel, config: PeftConfig, seed: int | None = None, name: str | None = None
) -> PeftModel:
    """Wrap `model` with an explicit PEFT config, checked as `apply_method` checks its own. `config` is not changed.

    Raises:
        ValueError: A module pattern that matches nothing, or no trainable parameter.
    """
    check_patterns(model, config)
    with seeded(seed), without_upstream_warnings():
        try:
            wrapped = wrap(model, with_named_targets(model, copy.deepcopy(config)))
        except (AttributeError, KeyError) as error:  # a kind of model that PEFT does not expect
            raise ValueError(
                f"{type(config).__name__} cannot be applied to {type(model).__name__}: {error}. Choose another method; "
                "`left-trainer methods --model NAME` lists those that work."
            ) from error
    if not any(parameter.requires_grad for parameter in wrapped.parameters()):
        raise ValueError(
            f"{type(config).__name__} leaves no trainable parameter in {type(model).__name__}, so training would "
            "change nothing. Check its target modules and `layers_to_transform`, or pass a config with "
            "inference_mode=False."
        )
    modules = matched_modules(wrapped)
    patterns = patterns_of(wrapped.peft_config[wrapped.active_adapter], "target_modules")
    wrapped.applied_method = AppliedMethod(
        name=name or method_name(config),
        matched_modules=modules,
        match_table={
            text_of(pattern): count
            for pattern in patterns
            if (count := count_matches(modules, pattern))  # X-LoRA's own config holds a dummy, its experts the names
        },
    )
    return wrapped


def method_name(config: PeftConfig) -> str:
    """The registered name of a config's method; PEFT's own type name, in lower case, where no record has it.

    Of several that share the config class, the one with the most preset options that the config has. Presets that
    differ by an optimizer or an initialisation leave no trace in a config.
    """
    methods = [method for method in list_methods() if is_made_by(config, method)]
    plain = [method for method in methods if not (method.initialize or method.optimizer or method.quantization)]
    if candidates := plain or methods[:1]:
        return max(candidates, key=lambda method: len(method.preset)).name
    return str(config.peft_type.value).lower()


def find_method(model: PreTrainedModel | PeftModel) -> PeftMethod | None:
    """The record of what `model` was wrapped or trained with; `None` where there is none.

    Args:
        model: Where `apply_method` has wrapped it, the name it was given tells presets with equal configs apart.
    """
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    applied = vars(model).get("applied_method")  # not of the model inside
    method = METHODS.find(applied.name) if applied else None
    if method is not None and _has_class(config, method):
        return method
    return METHODS.find(method_name(config)) if config else None


def is_made_by(config: PeftConfig, method: PeftMethod) -> bool:
    """Whether `config` is of the class of `method` and has its preset options."""
    return _has_class(config, method) and all(getattr(config, name) == value for name, value in method.preset.items())


def _has_class(config: PeftConfig | None, method: PeftMethod) -> bool:
    """Whether `config` is of the class of `method`, or of the class of PEFT that it replaces."""
    if config is None or method.config_class is None:
        return config is method.config_class
    return type(config) in (method.config_class, getattr(method.config_class, "replaces", None))


def matched_modules(model: PreTrainedModel | PeftModel) -> tuple[str, ...]:
    """Full names, in the base model, of the modules that the active adapter replaced."""
    tuner = getattr(model, "base_model", None) if isinstance(model, PeftModel) else None
    return tuple(getattr(tuner, "targeted_module_names", ()))


def _train_everything(model: PreTrainedModel, method: PeftMethod) -> PreTrainedModel:
    """Let all parameters be trained that are read, but for those that are frozen.

    Frozen are the user's choice and tables of sines. A model that is frozen as a whole has been inside of an adapter.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"peft_method={method.name!r} cannot train {type(model).__name__}: its weights are quantized "
                f"({parameter.dtype}). Load it without quantization, or choose an adapter method such as 'lora'."
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        with torch.device("meta"):
            fresh = dict(type(model)(copy.deepcopy(model.config)).named_parameters(remove_duplicate=False))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in fresh or fresh[name].requires_grad)
    for table in unread_tables(model).values():
        table.weight.requires_grad_(False)
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        # fp16 mixed precision keeps float32 weights to unscale gradients into; half ones stop in the first step.
        model.float()
        logger.warning(
            "The weights are float16, and peft_method=%r trains and saves them in float32, which takes twice their "
            "memory: in float16, updates are rounded away. Load the model in bfloat16 to train in its own precision.",
            method.name,
        )
    model.applied_method = AppliedMethod(name=method.name, matched_modules=(), match_table={})
    return model


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
