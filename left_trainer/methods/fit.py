"""Whether a saved adapter fits the model that it is put on, and giving the model the vocabulary that it was saved with.

PEFT passes over weights of the file that fit nothing, and leaves those at their start that the file lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import nn
from transformers import PreTrainedModel

from left_trainer.models.loading import without_pickled_code

MAX_NAMES_SHOWN = 4


def saved_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of the adapter in `path`, by their names there."""
    with without_pickled_code(f"The adapter in {str(path)!r}"):
        return load_peft_weights(str(path), device="cpu")  # type: ignore[no-any-return]


@torch.no_grad()
def take_saved_embeddings(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Give `model` the embeddings that an adapter was saved with, and so as many tokens.

    PEFT saves them where tokens were added to those of the base model.

    Args:
        model: The base model, without an adapter.
        weights: Of the adapter, as `saved_weights` reads them.
    """
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        saved = _saved_embeddings(model, get(), weights)
        if saved is None:
            continue
        if len(saved) != len(get().weight):
            model.resize_token_embeddings(len(saved), mean_resizing=False)
        get().weight.copy_(saved)


def _saved_embeddings(
    model: PreTrainedModel, embeddings: nn.Module | None, weights: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """What the file has under a name of the module `embeddings` of `model`; `None` where it has nothing."""
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is embeddings]
    endings = tuple(f".{name}.{part}weight" for name in names for part in ("", "base_layer."))
    return next((tensor for name, tensor in weights.items() if name.endswith(endings)), None)


def check_fit(model: PeftModel, path: str | Path, weights: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` where the adapter in `path` and the active one of `model` do not have the same weights.

    Args:
        model: With its adapter.
        path: Folder of the other, for the message.
        weights: Read from there by `saved_weights`.
    """
    missing, unexpected = _differences(model, weights)
    for names, what in ((missing, "lacks"), (unexpected, "has weights that the model has no place for:")):
        if names:
            shown = ", ".join(sorted(names)[:MAX_NAMES_SHOWN]) + (", ..." if len(names) > MAX_NAMES_SHOWN else "")
            raise no_fit(path, model.get_base_model(), f"the file {what} {shown}")


def _differences(model: PeftModel, weights: dict[str, torch.Tensor]) -> tuple[set[str], set[str]]:
    """Names of the weights that the file lacks, and of those that the model has no place for."""
    adapter, config = model.active_adapter, model.active_peft_config
    found = convert_peft_adapter_state_dict_for_transformers(model, config, weights, adapter)
    expected = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    names = {_short(name) for name in expected}, {_short(name) for name in found}
    places = names[0].union(map(_short, model.state_dict()))  # embeddings of the base model may be in the file too
    return names[0] - names[1], names[1] - places


def _short(name: str) -> str:
    return name.removeprefix("base_model.").removeprefix("model.")


def no_fit(path: str | Path, base: PreTrainedModel, reason: str) -> ValueError:
    """The error for an adapter that is not one of `base`."""
    name = base.config._name_or_path or type(base).__name__
    return ValueError(
        f"The adapter in {str(path)!r} does not fit {name}: {reason}. Check "
        "base_model_name_or_path and the target modules in its adapter_config.json: used like this, it would be "
        "another model than the trained one."
    )
