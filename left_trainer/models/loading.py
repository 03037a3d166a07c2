"""Loading the weights of a base model, and a tokenizer."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import set_zero3_state

from left_trainer.models.family import auto_class
from left_trainer.models.hub import HubRefusalError, asking_hub
from left_trainer.models.source import ModelSource

MAX_NAMES_SHOWN = 4


def load_model(model: str | ModelSource, quantization_config: Any = None) -> PreTrainedModel:
    """Load the weights of the base model that `model` names, without the adapter that its path may hold.

    As in TRL, the dtype is float32 unless the options name one, so that a checkpoint that was saved in half precision
    does not silently train in it.

    Args:
        model: Hub name or path, or what was made of one.
        quantization_config: For `from_pretrained`; beats the one among the options.

    Raises:
        ValueError: The checkpoint lacks weights of the model, or has them in other sizes; transformers would leave
            these random. Or it is a pickle that holds more than tensors.
    """
    source = ModelSource.of(model)
    options = {"dtype": "float32", **source.options}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if isinstance(options["dtype"], str) and options["dtype"] != "auto":
        options["dtype"] = getattr(torch, options["dtype"])
    config = copy.deepcopy(source.config)
    # Sizes are compared here, where they can be named: transformers raises an error that says to look at its log.
    options["ignore_mismatched_sizes"] = True
    revision = options.get("revision")
    with asking_hub("model", source.base_name, revision=revision), without_pickled_code(f"model={source.base_name!r}"):
        loaded, info = auto_class(source.family).from_pretrained(
            source.base_name, config=config, output_loading_info=True, **options
        )
    _check_complete(source.base_name, loaded, info)
    return loaded


@contextlib.contextmanager
def without_pickled_code(what: str) -> Iterator[None]:
    """Raise `ValueError` in place of what torch raises on a file of weights that holds other objects than tensors."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{what} has weights in a pickle (.bin, .pt or .pth) that is damaged or holds more than tensors, which "
            "could run code. It was not read. Ask for the weights as safetensors, from a source that you trust."
        ) from error


def _check_complete(name: str, loaded: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raise `ValueError` where weights of `loaded` are random: `info` is what transformers says about the loading."""
    sizes = [f"{key} ({_shape(found)} in place of {_shape(own)})" for key, found, own in info["mismatched_keys"]]
    for names, problem in (
        (sorted(info["missing_keys"]), "no weights for"),
        (sorted(sizes), "weights of another size for"),
    ):
        if names:
            shown = ", ".join(names[:MAX_NAMES_SHOWN]) + (", ..." if len(names) > MAX_NAMES_SHOWN else "")
            raise ValueError(
                f"model={name!r} has {problem} {shown} of {type(loaded).__name__}, which would be random. Pass a "
                "checkpoint that has them, with its own config.json. To train them from a random start, load the model "
                "yourself and pass it: LeftTrainer(AutoModel...from_pretrained(...), ...)."
            )


def _shape(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


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
        with asking_hub("model", name, revision=source.hub_options.get("revision")):
            tokenizer = AutoTokenizer.from_pretrained(
                name, config=source.config, trust_remote_code=source.trust_remote_code, **source.hub_options
            )
    except HubRefusalError:
        raise
    except Exception as error:  # a broken file raises whatever it breaks
        cause = f"The loader said: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"There is no tokenizer for model={name!r}. {advice} {cause}") from error
    # Where there are no files, transformers makes a tokenizer of special tokens alone for some model types (5.23).
    if len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()) <= 1:
        raise ValueError(f"There is no tokenizer for model={name!r}, or one without a vocabulary. {advice}")
    return tokenizer


def build_skeleton(source: ModelSource) -> PreTrainedModel:
    """The model of `source` on the meta device: every module and shape, no weight.

    With DeepSpeed ZeRO-3, transformers would spread over the processes what has nothing to spread.
    """
    with set_zero3_state(), torch.device("meta"):
        return auto_class(source.family).from_config(
            copy.deepcopy(source.config), trust_remote_code=source.trust_remote_code
        )
