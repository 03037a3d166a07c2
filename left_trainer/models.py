"""Which family a model belongs to, and loading one by name or path."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from left_trainer.adapter_files import load_training_only_state, training_only_state

ModelFamily = Literal["encoder_decoder", "decoder_only"]
FAMILIES: tuple[ModelFamily, ...] = get_args(ModelFamily)

ADAPTER_CONFIG_FILE = "adapter_config.json"
UPSTREAM_WARNINGS = (
    "`is_gradient_checkpointing`",  # peft 0.21 reads a name that transformers 5.23 deprecates
    "Unsupported layer type",  # LN tuning knows torch's own normalization layers and trains the others as well
    "Failed to load the CUDA extension",  # BOFT, where there is no CUDA
    "Sparse invariant checks",  # FRoD's sparse core; torch tells every program that has one
    "Detected that the base layer has no bias term",  # BEFT; merging then says so
    "Setting boft_n_butterfly_factor to 1",  # BOFT without CUDA, where it is 1 already
    "`init_lora_weights` is 'eva'",
    "lora with eva initialization used with low_cpu_mem_usage=False",
    r"The following rank_pattern keys did not match .*\.lora_E",  # AdaLoRA's name factors, peft 0.21 looks for modules
)
HUB_ARGUMENTS = ("revision", "token", "trust_remote_code", "cache_dir", "local_files_only", "subfolder")


_UNWRAPPED: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def unwrapped(model: torch.nn.Module) -> Any:
    """What the wrappers for several devices hold.

    Looked up once for each model: accelerate looks at every module of it, which in a small model's training takes a
    twentieth of the time.
    """
    found = _UNWRAPPED.get(model)
    inner = found() if found else None
    if inner is None:
        inner = extract_model_from_parallel(model)
        _UNWRAPPED[model] = weakref.ref(inner)
    return inner


def without_adapter(model: PreTrainedModel | PeftModel) -> Any:
    """The transformers model inside of an adapter's, or `model` itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_adapter_directory(path: str) -> bool:
    return (Path(path) / ADAPTER_CONFIG_FILE).is_file()


def load_config(model: str, **model_init_kwargs: Any) -> PreTrainedConfig:
    """The config of `model`, a name or path; of its base model when the path holds an adapter.

    Raises `ValueError` when there is no such model, before any weight is loaded.
    """
    hub_arguments = {key: model_init_kwargs[key] for key in HUB_ARGUMENTS if key in model_init_kwargs}
    if is_adapter_directory(model):
        model = PeftConfig.from_pretrained(model).base_model_name_or_path
    try:
        return AutoConfig.from_pretrained(model, **hub_arguments)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model={model!r} is neither a directory with a config.json nor a model that the Hugging Face hub has "
            "under this name (for a private one pass a token: `hf auth login`, or model_init_kwargs={'token': ...}). "
            f"The loader said: {' '.join(str(error).split())[:300]}"
        ) from error


def model_family(model: str | PreTrainedModel | PeftModel | PreTrainedConfig, **model_init_kwargs: Any) -> ModelFamily:
    """`encoder_decoder` or `decoder_only`, from the model's class or, before it is loaded, from its config.

    Raises `ValueError` for any other kind of model. An encoder-only model is such a one: a causal head on a
    bidirectional encoder would train on an objective in which each token sees itself.
    """
    if isinstance(model, str):
        model = load_config(model, **model_init_kwargs)
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if isinstance(model, PreTrainedConfig):
        config, class_names = model, _loaded_class_names(model)
    else:
        config, class_names = model.config, {cls.__name__ for cls in type(model).__mro__}
    if class_names & set(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()):
        return "encoder_decoder"
    encoder_only = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if class_names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) and not encoder_only:
        return "decoder_only"
    name = getattr(config, "_name_or_path", "") or config.model_type
    kind = "an encoder-only model" if encoder_only else "neither an encoder-decoder nor a decoder-only language model"
    raise ValueError(
        f"model={name!r} ({'/'.join(sorted(config.architectures or [config.model_type]))}) is {kind}. "
        "LeftTrainer fine-tunes models that generate text: pass one that loads with `AutoModelForSeq2SeqLM` (T5, BART, "
        "Marian, ...) or `AutoModelForCausalLM` (GPT-2, Llama, Qwen, ...)."
    )


def _loaded_class_names(config: PreTrainedConfig) -> set[str]:
    """Names of the classes that the auto classes would choose for `config`, encoder-decoder ones first."""
    remote = set(getattr(config, "auto_map", None) or {})
    for auto_class, names in (
        ("AutoModelForSeq2SeqLM", MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        chosen = names.get(config.model_type)
        if chosen is not None:
            return {chosen} if isinstance(chosen, str) else set(chosen)
        if auto_class in remote:
            # Any member of the mapping says the same: this model's own class is known only once its code has run.
            return {next(iter(names.values()))}
    return set()


def auto_class(family: ModelFamily) -> type[AutoModelForSeq2SeqLM] | type[AutoModelForCausalLM]:
    return AutoModelForSeq2SeqLM if family == "encoder_decoder" else AutoModelForCausalLM


def load_model(model: str, is_trainable: bool = True, **model_init_kwargs: Any) -> PreTrainedModel | PeftModel:
    """Load a model, or an adapter onto its base model, by name or path.

    Args:
        model: Hub name or path.
        is_trainable: Whether an adapter found there is to be trained further.
        model_init_kwargs: For `from_pretrained`. As in TRL, `dtype` is float32 unless given, so that a checkpoint that
            was saved in half precision does not silently train in it.
    """
    family = model_family(model, **model_init_kwargs)
    dtype = model_init_kwargs.pop("dtype", "float32")
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    adapter = model if is_adapter_directory(model) else None
    if adapter is not None:
        model = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    loaded = auto_class(family).from_pretrained(model, dtype=dtype, **model_init_kwargs)
    if adapter is None:
        return loaded
    with without_upstream_warnings():
        return _load_adapter(loaded, adapter, is_trainable)


@contextlib.contextmanager
def without_upstream_warnings() -> Iterator[None]:
    """Hide what wrapping a model warns about and a user can do nothing about."""
    with warnings.catch_warnings():
        for message in UPSTREAM_WARNINGS:
            warnings.filterwarnings("ignore", message)
        yield


def _load_adapter(model: PreTrainedModel, path: str, is_trainable: bool) -> PeftModel:
    config = PeftConfig.from_pretrained(path)
    if not (is_trainable and config.is_prompt_learning):
        return PeftModel.from_pretrained(model, path, is_trainable=is_trainable)
    # PEFT refuses to load a soft prompt for training; a new one of the same config takes what was saved.
    config.inference_mode = False
    wrapped = get_peft_model(model, config)
    if training_only_state(wrapped):
        load_training_only_state(wrapped, path)
    else:
        wrapped.load_adapter(path, wrapped.active_adapter, is_trainable=True)
    return wrapped


def build_skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `config` on the meta device: every module and shape, no weight."""
    with torch.device("meta"):
        return auto_class(model_family(config)).from_config(config, trust_remote_code=trust_remote_code)
