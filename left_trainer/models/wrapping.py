"""What stands around a model: wrappers for several devices, an adapter, warnings while it is put there or merged."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel

UPSTREAM_WARNINGS = (
    "`is_gradient_checkpointing`",  # peft 0.21 reads a name that transformers 5.23 deprecates
    "Unsupported layer type",  # LN tuning knows torch's own normalization layers and trains the others as well
    "Failed to load the CUDA extension",  # BOFT, where there is no CUDA
    "Sparse invariant checks",  # FRoD's sparse core; torch tells every program that has one
    "Detected that the base layer has no bias term",  # BEFT; merging then says so
    "Setting boft_n_butterfly_factor to 1",  # BOFT without CUDA, where it is 1 already
    "`init_lora_weights` is 'eva'",
    "lora with eva initialization used with low_cpu_mem_usage=False",
    r"The following (rank|alpha)_pattern keys did not match .*_proj",  # PEFT's own, for experts that no target reaches
    r"The following rank_pattern keys did not match .*\.lora_E",  # AdaLoRA's name factors, peft 0.21 looks for modules
    "Input and output embeddings are no longer tied after merging",  # merging then ties them again, or keeps both
)


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


def class_without_sharding(module: torch.nn.Module) -> type[Any]:
    """The class of `module`, also where FSDP2 has put one between that and its instance."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


@torch.no_grad()
def gather_outer(model: torch.nn.Module) -> None:
    """Have what FSDP2 shards of `model` outside of its layers whole, before a part of it is called on its own.

    It does so before each call of `model`, and of a method that is named to it.
    """
    if isinstance(model, FSDPModule):
        if "gather" not in vars(model):
            model.gather = lambda: None  # type: ignore[assignment]
            register_fsdp_forward_method(model, "gather")
        model.gather()  # type: ignore[operator]


def reshard(model: torch.nn.Module) -> None:
    """Free the whole weights that FSDP2 has gathered on this process, on every process alike.

    Reading the state of a model frees them too. Where one process alone saves, it would gather them for the next step
    while the others do not.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model` draws no dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def without_upstream_warnings() -> Iterator[None]:
    """Hide what wrapping or merging a model warns about and a user can do nothing about."""
    with warnings.catch_warnings():
        for message in UPSTREAM_WARNINGS:
            warnings.filterwarnings("ignore", message)
        yield
