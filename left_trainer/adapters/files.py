"""Writing adapters so that a kill leaves whole files, with everything that training needs to go on."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import PeftModel, PeftType
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from left_trainer.adapters.residual_base import has_residual_base, initial_adapter, subtract_initial_adapter

TRAINING_STATE_FILE = "adapter_training_state.safetensors"
# Parts of the file, as prefixes of the names in it.
TRAINED, INITIAL, KEPT_RANKS = "trained", "initial", "kept_ranks"
SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # attributes of PEFT's RankAllocator


def training_only_state(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """What training goes on from but the adapter's inference file leaves out; empty for most methods.

    - Soft prompts with an encoder: PEFT saves only the prompts that it computes. P-tuning's MLP and a prefix projection
      are needed to train on, and without them resume and best-model restore put computed prompts where the encoder's
      own input belongs.
    - AdaLoRA: PEFT saves only the ranks that are left, and not the importance scores that choose them.
    - X-LoRA: PEFT does not load its classifier into a model that has one.
    - A residual base (PiSSA and others): the initial factors, from which the base is made again.
    """
    if not isinstance(model, PeftModel):
        return {}
    if has_residual_base(model):
        return {**_prefixed(TRAINED, get_peft_model_state_dict(model)), **_prefixed(INITIAL, initial_adapter(model))}
    kind = model.active_peft_config.peft_type
    if kind in (PeftType.ADALORA, PeftType.XLORA):
        trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {**_prefixed(TRAINED, trained), **(_allocator_state(model) if kind == PeftType.ADALORA else {})}
    if model.active_peft_config.is_prompt_learning:
        state: dict[str, torch.Tensor] = model.prompt_encoder[model.active_adapter].state_dict()
        return {} if set(state) == {"embedding.weight"} else state
    return {}


def _prefixed(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def _part(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in state.items() if name.startswith(f"{prefix}.")}


def _allocator_state(model: PeftModel) -> dict[str, torch.Tensor]:
    allocator = model.base_model.rankallocator
    pattern = model.active_peft_config.rank_pattern or {}
    return {
        **{name: tensor for score in SCORES for name, tensor in _prefixed(score, getattr(allocator, score)).items()},
        **_prefixed(KEPT_RANKS, {name: torch.tensor(kept) for name, kept in pattern.items()}),
    }


@contextlib.contextmanager
def without_rank_warnings(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Hide PEFT's warning that a saved LoRA factor is empty, which AdaLoRA's are where it took every rank away."""
    with warnings.catch_warnings():
        if isinstance(model, PeftModel) and model.active_peft_config.peft_type == PeftType.ADALORA:
            warnings.filterwarnings("ignore", ".*have invalid shape")
        yield


def save_training_only_state(model: PreTrainedModel | PeftModel, directory: str | Path) -> None:
    """Write the sidecar of `training_only_state` into `directory`; nothing where it is empty."""
    state = training_only_state(model)
    if state:
        path = Path(directory) / TRAINING_STATE_FILE
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, beside)
        beside.replace(path)


def load_training_only_state(model: PreTrainedModel | PeftModel, directory: str | Path) -> bool:
    """Restore the sidecar from `directory` into the active adapter. `False` where none is there and none is needed.

    Raises:
        FileNotFoundError: The method needs a sidecar and the directory has none, so training cannot go on from it.
    """
    path = Path(directory) / TRAINING_STATE_FILE
    if not path.is_file():
        if not training_only_state(model):
            return False
        raise FileNotFoundError(
            f"{directory} has no {TRAINING_STATE_FILE}. {model.active_peft_config.peft_type.value} cannot be restored "
            "for training without it: PEFT saves only what inference needs. Continue from a checkpoint written by "
            "LeftTrainer or with AdapterSaverCallback."
        )
    state = load_file(path)
    if _part(INITIAL, state):
        if not has_residual_base(model):
            subtract_initial_adapter(model, _part(INITIAL, state))
        set_peft_model_state_dict(model, _part(TRAINED, state))
    elif _part(TRAINED, state):
        with torch.no_grad():
            parameters = dict(model.named_parameters())
            for name, tensor in _part(TRAINED, state).items():
                parameters[name].copy_(tensor)
        if model.active_peft_config.peft_type == PeftType.ADALORA:
            _load_allocator_state(model, state)
    else:
        model.prompt_encoder[model.active_adapter].load_state_dict(state)
    return True


def _load_allocator_state(model: PeftModel, state: Mapping[str, torch.Tensor]) -> None:
    allocator = model.base_model.rankallocator
    device = {name: parameter.device for name, parameter in model.base_model.model.named_parameters()}
    for score in SCORES:
        setattr(allocator, score, {name: tensor.to(device[name]) for name, tensor in _part(score, state).items()})
    kept = {name: mask.tolist() for name, mask in _part(KEPT_RANKS, state).items()}
    model.active_peft_config.rank_pattern = kept or None


def complete_adapter_directory(model: PreTrainedModel | PeftModel, directory: str | Path) -> None:
    """Add what PEFT's `save_pretrained` leaves out: the sidecar for training, and what to import before loading."""
    save_training_only_state(model, directory)
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
    if f"import {package}" not in text:
        readme.write_text(f"{text.rstrip()}\n\n## Load it\n\n{note}", encoding="utf-8")


def save_adapter(model: PeftModel, directory: str | Path, notes: Mapping[str, str] | None = None) -> Path:
    """Save the active adapter, safetensors only, with its sidecar, so that `directory` is whole or absent.

    The files are written into a hidden directory beside it, flushed, and renamed into place; an existing `directory`
    is replaced. `PeftModel.from_pretrained(base, directory)` loads it.

    Args:
        model: Its active adapter is saved.
        directory: Where.
        notes: Further text files by name.
    """
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    old = target.parent / f".{target.name}.{uuid.uuid4().hex}.old"
    try:
        with without_rank_warnings(model):
            model.save_pretrained(beside, safe_serialization=True, selected_adapters=[model.active_adapter])
        complete_adapter_directory(model, beside)
        for name, text in (notes or {}).items():
            (beside / name).write_text(text, encoding="utf-8")
        for path in beside.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if target.exists():
            target.rename(old)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return target
