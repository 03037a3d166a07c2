"""Why parts cannot be taken out of a model that is loaded, with the adapter that it has."""

from __future__ import annotations

from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from left_trainer.compression.architecture import architecture_of
from left_trainer.compression.sizes import Size, size_of
from left_trainer.methods.apply import find_method, method_name
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.registry import METHODS
from left_trainer.methods.renumbering import targets_of
from left_trainer.models import without_adapter


def why_not_shrinkable(model: PreTrainedModel | PeftModel, size: Size | None = None) -> str | None:
    """Why parts cannot be taken out of `model`, in a sentence; `None` where they can.

    Args:
        model: Without or with an adapter.
        size: What the model is to be shrunk to. By default all of its parts are to be cut.
    """
    base = without_adapter(model)
    try:
        now = size_of(base.config)
    except ValueError as error:
        return str(error)
    quantized = next((name for name, weight in base.named_parameters() if not weight.is_floating_point()), None)
    if quantized is not None:
        return f"The base model is quantized ({quantized!r}), and packed weights cannot be cut. Load it unquantized."
    if not isinstance(model, PeftModel):
        return None
    narrowed = _narrowed(model, now, size)
    for method in _records(model):
        if not method.supports("shrinking"):
            return f"peft_method={method.name!r} does not work with shrink_to: {method.unsupported['shrinking']}"
        if narrowed and not method.supports("narrowing"):
            return (
                f"peft_method={method.name!r} is on layers that {' and '.join(narrowed)} would cut, and does not work "
                f"with that: {method.unsupported['narrowing']}"
            )
    return None


def _records(model: PeftModel) -> list[PeftMethod]:
    """The records of the adapters of `model`: by what it was wrapped with, and by the options of each config."""
    by_config = (METHODS.find(method_name(config)) for config in model.peft_config.values())
    return [method for method in (find_method(model), *by_config) if method is not None]


def _narrowed(model: PeftModel, now: Size, size: Size | None) -> list[str]:
    """`ffn` and `heads`, where what they would cut has a layer of an adapter."""
    config = without_adapter(model).config
    targets = {target for adapter in model.peft_config for target in targets_of(model, adapter)}
    cut = {"ffn": size is None or size.ffn != now.ffn, "heads": size is None or size.heads != now.heads}
    return [name for name, is_cut in cut.items() if is_cut and any(_is_of(name, config, each) for each in targets)]


def _is_of(option: str, config: PreTrainedConfig, name: str) -> bool:
    """Whether a cut of `ffn` or `heads` touches the module `name` or what is in it."""
    architecture = architecture_of(config)
    linears = (*architecture.feed_forward_inputs, architecture.feed_forward_output)
    for block in architecture.blocks(config):
        cut = block.attentions if option == "heads" else tuple(f"{block.feed_forward}.{linear}" for linear in linears)
        if any(name == path or name.startswith(f"{path}.") for path in cut):
            return option == "ffn" or architecture.has_free_heads
    return False
