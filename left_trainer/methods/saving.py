"""Saving what a method has trained, and loading it again, for training or for use."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import PreTrainedModel

from left_trainer.adapters.base_model import base_bytes, is_changed, mark_changed, write_base
from left_trainer.adapters.files import TRAINING_STATE_FILE, read_training_state, write_training_state
from left_trainer.adapters.text_files import write_whole
from left_trainer.adapters.whole_weights import whole_weights
from left_trainer.methods.apply import find_method, method_name
from left_trainer.methods.fit import check_fit, no_fit, saved_weights, take_saved_embeddings
from left_trainer.methods.input_prompts import wrap
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.registry import METHODS
from left_trainer.methods.virtual_tokens import Positions
from left_trainer.models import ModelSource, load_model, without_upstream_warnings
from left_trainer.models.wrapping import reshard
from left_trainer.storage.whole import whole_directory
from left_trainer.tuners.input_prompts.config import InputPrompt

MAX_CAUSE_LENGTH = 300


def training_state(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """What training goes on from but the adapter's inference file leaves out; empty for most methods."""
    method = find_method(model)
    return method.training_state.collect(model) if method and method.training_state else {}


def restore_training_state(model: PreTrainedModel | PeftModel, directory: str | Path) -> bool:
    """Restore the sidecar from `directory` into the active adapter. `False` where none is there and none is needed.

    Raises:
        FileNotFoundError: The method needs a sidecar and the directory has none, so training cannot go on from it.
        ValueError: The directory has a sidecar and the method knows none: another method wrote it.
    """
    method, state = find_method(model), read_training_state(directory)
    if state is None:
        if not training_state(model):
            return False
        raise FileNotFoundError(
            f"{directory} has no {TRAINING_STATE_FILE}. {method.name if method else 'The adapter'} cannot be restored "
            "for training without it: PEFT saves only what inference needs. Continue from a checkpoint written by "
            "LeftTrainer or with AdapterRestoreCallback."
        )
    if method is None or method.training_state is None:
        raise ValueError(
            f"{directory} holds {TRAINING_STATE_FILE}, which "
            f"{'the adapter' if method is None else f'peft_method={method.name!r}'} has no use for: the checkpoint is "
            "of another method. Pass the peft_method that it was trained with."
        )
    method.training_state.restore(model, state)
    return True


def check_saved_adapter(model: PreTrainedModel | PeftModel, directory: str | Path) -> None:
    """Raise `ValueError` where `directory` holds another adapter than the active one of `model`."""
    if isinstance(model, PeftModel) and (Path(directory) / CONFIG_NAME).is_file():
        with without_saving_warnings(model):
            check_fit(model, directory, saved_weights(directory))


@contextlib.contextmanager
def without_saving_warnings(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Hide what PEFT warns about when it saves `model` and the method's record calls expected."""
    method = find_method(model)
    with warnings.catch_warnings():
        for message in method.saving_warnings if method else ():
            warnings.filterwarnings("ignore", message)
        yield


@contextlib.contextmanager
def saving_active_adapter(model: PreTrainedModel | PeftModel, directory: str | Path) -> Iterator[None]:
    """Inside, `model.save_pretrained(directory)` writes the active adapter, and it alone, where loaders look for one.

    PEFT writes every adapter that the model carries, and each one not called `default` into a folder of its own, which
    neither `from_pretrained` nor `Trainer` takes for what was trained.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    save, own = model.save_pretrained, "save_pretrained" in vars(model)
    model.save_pretrained = functools.partial(save, selected_adapters=[model.active_adapter])
    try:
        with without_saving_warnings(model):
            yield
    finally:
        if own:
            model.save_pretrained = save
        else:
            del model.save_pretrained
    folder = Path(directory) / model.active_adapter
    if (folder / CONFIG_NAME).is_file():
        for file in folder.iterdir():
            file.replace(Path(directory) / file.name)
        folder.rmdir()


def complete_adapter_directory(model: PreTrainedModel | PeftModel, directory: str | Path, place: str | Path) -> None:
    """Add what PEFT's `save_pretrained` leaves out.

    That is the sidecar for training, the base model where its name no longer loads it, and what to import first.

    Args:
        model: With the adapter.
        directory: Where PEFT has saved it.
        place: Where that will be in the end.
    """
    write_training_state(training_state(model), directory)
    write_base(model, directory, place)
    explain_loading(model, directory)


def explain_loading(model: PreTrainedModel | PeftModel, directory: str | Path) -> None:
    """Say in the saved README what to import first, where the adapter's type is not PEFT's own."""
    package = type(model.active_peft_config).__module__.partition(".")[0] if isinstance(model, PeftModel) else "peft"
    readme = Path(directory) / "README.md"
    if package == "peft" or not readme.is_file():
        return
    text = readme.read_text(encoding="utf-8")
    code = f'import {package}\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, "THIS_FOLDER")'
    note = f"`PeftModel.from_pretrained` knows this adapter after `import {package}`:\n\n```python\n{code}\n```\n"
    if isinstance(model.active_peft_config, InputPrompt):
        code = code.replace("model =", "from left_trainer.runs.inference import prepare_for_use\n\nmodel =", 1)
        note = (
            "Its virtual tokens stand beside what the model computes from token ids. `prepare_for_use` makes PEFT do "
            f"the same:\n\n```python\n{code}\nprepare_for_use(model)\n```\n\nPlain PEFT gives the same on models "
            "without a scale and with one table of embeddings, unless `prompt_position` is `after`.\n"
        )
    if f"import {package}" not in text:
        write_whole(readme, f"{text.rstrip()}\n\n## Load it\n\n{note}")


def trainable_bytes(model: nn.Module) -> int:
    """Bytes of what is trained, and of a base that is saved with it, which is about what saving it takes."""
    trained = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)
    return trained + base_bytes(model)


def whole_to_save(model: nn.Module, is_main: bool) -> contextlib.AbstractContextManager[None]:
    """Inside, what is saved of the adapter of `model` is whole on the process that writes; all processes enter.

    Args:
        model: With or without an adapter, and without wrappers.
        is_main: Whether this process writes.
    """
    reshard(model)
    if not isinstance(model, PeftModel):
        return contextlib.nullcontext()
    base = model.get_base_model()
    ends = [module for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None]
    # PEFT saves the embeddings with the adapter where tokens were added.
    of_ends = {weight for module in ends for weight in module.parameters()}
    needed = [weight for weight in model.parameters() if weight.requires_grad or weight in of_ends or is_changed(model)]
    return whole_weights(model, needed, is_main)


def save_adapter(model: PeftModel, directory: str | Path, notes: Mapping[str, str] | None = None) -> Path:
    """Save the active adapter, safetensors only, with its sidecar, so that `directory` is whole or absent.

    An existing `directory` is replaced. `PeftModel.from_pretrained(base, directory)` loads it.

    Args:
        model: Its active adapter is saved.
        directory: Where.
        notes: Further text files by name.
    """
    with whole_directory(directory, trainable_bytes(model)) as folder:
        with saving_active_adapter(model, folder):
            model.save_pretrained(folder, safe_serialization=True)
        complete_adapter_directory(model, folder, directory)
        for name, text in (notes or {}).items():
            write_whole(folder / name, text)
    return Path(directory)


def load_trained(
    model: str | ModelSource, is_trainable: bool = True, quantization_config: Any = None
) -> PreTrainedModel | PeftModel:
    """Load the model that `model` names, with the adapter that its path holds.

    Args:
        model: Hub name or path, or what was made of one.
        is_trainable: Whether an adapter found there is to be trained further.
        quantization_config: As for `load_model`, which loads the base weights.

    Returns:
        A `PeftModel` where there is an adapter, a `PreTrainedModel` where there is none.

    Raises:
        ValueError: The adapter does not fit its base model.
    """
    source = ModelSource.of(model)
    base = load_model(source, quantization_config)
    if source.adapter is None:
        return base
    path, method = str(source.model), adapter_method(source)
    for setting, value in method.model_config.items() if method else ():
        setattr(base.config, setting, value)
    with without_upstream_warnings():
        weights = saved_weights(path)
        take_saved_embeddings(base, weights)
        try:
            wrapped = _with_adapter(base, path, source.adapter, is_trainable)
        except (RuntimeError, KeyError) as error:
            raise no_fit(path, base, " ".join(str(error).split())[:MAX_CAUSE_LENGTH]) from error
        with without_saving_warnings(wrapped):
            check_fit(wrapped, path, weights)
    if source.has_base_beside:  # and is saved again with what is trained further
        mark_changed(wrapped)
    return wrapped


def adapter_method(source: ModelSource) -> PeftMethod | None:
    """The record of the adapter that `source` holds; `None` where there is no adapter or no record.

    The name that the run has noted tells presets with equal configs apart, such as LoRA on a quantized base.
    """
    if source.adapter is None:
        return None
    noted = source.settings.method if source.settings else None
    return METHODS.find(noted or method_name(source.adapter))


def adapter_positions(source: ModelSource) -> Positions:
    """The positions that the adapter that `source` holds takes from those of its model."""
    method = adapter_method(source)
    return method.positions(vars(source.adapter), source.family) if method else Positions()


def _with_adapter(model: PreTrainedModel, path: str, config: PeftConfig, is_trainable: bool) -> PeftModel:
    method = METHODS.find(method_name(config))
    if not (is_trainable and method and method.virtual_tokens):
        return PeftModel.from_pretrained(model, path, is_trainable=is_trainable)
    # PEFT refuses to load a soft prompt for training; a new one of the same config takes what was saved.
    wrapped = wrap(model, dataclasses.replace(config, inference_mode=False))
    if not restore_training_state(wrapped, path):
        wrapped.load_adapter(path, wrapped.active_adapter, is_trainable=True)
    return wrapped
