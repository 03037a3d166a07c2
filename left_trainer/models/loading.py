"""Loading a model, an adapter on its base, a tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from left_trainer.adapters.files import load_training_only_state, training_only_state
from left_trainer.models.family import auto_class
from left_trainer.models.source import ModelSource
from left_trainer.models.wrapping import without_upstream_warnings


def load_model(model: str | ModelSource, is_trainable: bool = True, quantization_config: Any = None) -> Any:
    """Load the weights that `model` names, with the adapter that its path holds.

    Args:
        model: Hub name or path, or what was made of one.
        is_trainable: Whether an adapter found there is to be trained further.
        quantization_config: For `from_pretrained`; beats the one among the options.

    Returns:
        A `PreTrainedModel`, or a `PeftModel` where there is an adapter. As in TRL, the dtype is float32 unless the
        options name one, so that a checkpoint that was saved in half precision does not silently train in it.
    """
    source = ModelSource.of(model)
    options = {"dtype": "float32", **source.options}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if isinstance(options["dtype"], str) and options["dtype"] != "auto":
        options["dtype"] = getattr(torch, options["dtype"])
    config = copy.deepcopy(source.config)
    loaded = auto_class(source.family).from_pretrained(source.base_name, config=config, **options)
    if source.adapter is None:
        return loaded
    with without_upstream_warnings():
        return _load_adapter(loaded, str(source.model), is_trainable)


def load_tokenizer(model: str | Path | ModelSource, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model, or beside the base model of an adapter that has none.

    Args:
        model: Hub name, path, or what was made of one.
        options: As `model_init_kwargs`: `revision`, `token`, `trust_remote_code`, ...

    Raises:
        ValueError: There is no such model, or no tokenizer beside it.
    """
    source = ModelSource.of(model, options)
    name = source.model if isinstance(source.model, str) else source.base_name
    if Path(name).is_dir() and not any(Path(name).glob("*token*")):
        name = source.base_name
    advice = "Pass the one that the model was trained with: processing_class=AutoTokenizer.from_pretrained(...)."
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, config=source.config, trust_remote_code=source.trust_remote_code, **source.hub_options
        )
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())[:300]
        raise ValueError(f"There is no tokenizer for model={name!r}. {advice} The loader said: {cause}") from error
    # Where there are no files, transformers makes a tokenizer of special tokens alone for some model types (5.23).
    if len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()) <= 1:
        raise ValueError(f"There is no tokenizer for model={name!r}, or one without a vocabulary. {advice}")
    return tokenizer


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


def build_skeleton(source: ModelSource) -> PreTrainedModel:
    """The model of `source` on the meta device: every module and shape, no weight."""
    with torch.device("meta"):
        return auto_class(source.family).from_config(
            copy.deepcopy(source.config), trust_remote_code=source.trust_remote_code
        )
