"""Folding an adapter into the weights of its base model, checked before anything appears."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from left_trainer.adapters.run_settings import RunSettings
from left_trainer.evaluation.generation import write_generation_config
from left_trainer.methods.saving import adapter_method, load_trained
from left_trainer.models import (
    ModelFamily,
    ModelSource,
    auto_class,
    is_adapter_directory,
    load_tokenizer,
    without_upstream_warnings,
)
from left_trainer.models.hub import is_hub_name
from left_trainer.runs.inference import folder_of, prepare_for_use, source_for_use, stored_generation_config
from left_trainer.storage.locks import beside_lock, folder_lock
from left_trainer.storage.whole import whole_directory

# Largest difference of logits, as a part of their own size.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
PROBE_SHAPE = (2, 8)


def merge_adapter(
    path: str,
    output_dir: str | Path,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    hub: Mapping[str, Any] | None = None,
) -> torch.dtype:
    """Merge the adapter in `path` and save the whole model, its tokenizer and its generation settings.

    The merged model is computed with before and after it is saved: where its logits are not those of the base model
    with the adapter, nothing is written.

    Args:
        path: Folder of the adapter, or its name on the hub.
        output_dir: New folder.
        trust_remote_code: Whether code that comes with the base model may run.
        dtype: Of the weights; by default that of the run, else that of the checkpoint.
        hub: `revision` and `token` of a name on the hub.

    Returns:
        The dtype of the merged weights.

    Raises:
        ValueError: The folder holds no adapter, or one that cannot be merged; the message says why.
        FolderInUseError: Another process merges into `output_dir`.
        WriteFailedError: The disk is full, read-only or gone; `output_dir` is as it was.
    """
    source = _mergeable_source(path, trust_remote_code, dtype, hub)
    tokenizer = load_tokenizer(source)
    model = load_trained(source, is_trainable=False)
    prepare_for_use(model, source)
    expected = probe(model, source.family)
    was_tied = bool(getattr(model.get_base_model().config.get_text_config(), "tie_word_embeddings", False))
    if _adapts_tied_embeddings(model):
        _untie_output(model.get_base_model())
    generation = stored_generation_config(folder_of(source), model)
    with without_upstream_warnings():
        merged = model.merge_and_unload(progressbar=True)
    if was_tied:
        _tie_equal_embeddings(merged)
    weights_dtype: torch.dtype = merged.dtype
    check_logits(probe(merged, source.family), expected, weights_dtype, path, "merging changes")
    settings = dataclasses.replace(source.settings or RunSettings(), dtype=str(weights_dtype).removeprefix("torch."))
    size = sum(weight.numel() * weight.element_size() for weight in merged.parameters())
    with folder_lock(output_dir, lock_file=beside_lock(output_dir)), whole_directory(output_dir, size) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_generation_config(generation, folder)
        dataclasses.replace(settings, method=None, model_init_kwargs={}).write(folder)
        del model, merged
        gc.collect()
        reloaded = auto_class(source.family).from_pretrained(
            folder, dtype=weights_dtype, trust_remote_code=trust_remote_code
        )
        check_logits(probe(reloaded, source.family), expected, weights_dtype, path, "saving the merged model changes")
    return weights_dtype


def _mergeable_source(
    path: str, trust_remote_code: bool, dtype: str | None, hub: Mapping[str, Any] | None
) -> ModelSource:
    source = source_for_use(path, trust_remote_code, dtype, hub) if is_hub_name(path) else None
    if not is_adapter_directory(path if source is None else folder_of(source)):
        raise ValueError(f"{path!r} holds no adapter (no adapter_config.json), so there is nothing to merge.")
    source = source or source_for_use(path, trust_remote_code, dtype)
    method = adapter_method(source)
    name = method.name if method else str(source.adapter.peft_type.value).lower()  # type: ignore[union-attr]
    if source.is_quantized:
        reason = "on a quantized base, whose weights would be rounded again"
    elif method is None or not method.mergeable:
        reason = "which adds inputs or layers that no weight of the base can hold"
    else:
        return source
    raise ValueError(
        f"{path!r} was trained with {name}, {reason}, so it cannot be merged. Serve it as an adapter: "
        "PeftModel.from_pretrained(base, path)."
    )


@torch.no_grad()
def probe(model: PreTrainedModel | PeftModel, family: ModelFamily) -> torch.Tensor:
    """Logits `(batch, sequence, vocabulary)` for ids from all over the vocabulary."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(torch.Size(PROBE_SHAPE).numel()) * max(1, size // 17) % size).view(PROBE_SHAPE)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "encoder_decoder":
        inputs["decoder_input_ids"] = ids
    return model.eval()(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits.float().cpu()


def check_logits(logits: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, path: str, what: str) -> None:
    """Raise `ValueError` where `logits` are not those `expected` of weights of `dtype`; `what` changes them."""
    size = expected.std().clamp(min=torch.finfo(torch.float32).tiny)
    difference = ((logits - expected).std() / size).item() if logits.shape == expected.shape else float("nan")
    if not difference <= TOLERANCES.get(dtype, 0.0):
        raise ValueError(
            f"The adapter in {path!r} cannot be merged: {what} what it computes (logits by {difference:.1%} of their "
            "size), so nothing was written. Serve it as an adapter: PeftModel.from_pretrained(base, path)."
        )


def _adapts_tied_embeddings(model: PeftModel) -> bool:
    """Whether one matrix serves as both embeddings and an adapter changes one of these uses alone."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    inner = [getattr(layer, "base_layer", layer) for layer in layers]
    if any(layer is None for layer in inner) or inner[0].weight is not inner[1].weight:
        return False
    return any(layer is not base for layer, base in zip(layers, inner, strict=True))


def _untie_output(base: PreTrainedModel) -> None:
    """Give the output embeddings a matrix of their own, equal to that of the input embeddings."""
    layer = base.get_output_embeddings()
    layer = getattr(layer, "base_layer", layer)
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def _tie_equal_embeddings(merged: PreTrainedModel) -> None:
    """Tie the embeddings again where merging has changed both alike; else save each of them, and let the config say so.

    Trained tokens change both alike, and are saved once.
    """
    output, first = merged.get_output_embeddings(), merged.get_input_embeddings().weight
    if output is None:
        return
    are_equal = torch.equal(output.weight, first)
    for config in (merged.config, merged.config.get_text_config()):
        config.tie_word_embeddings = are_equal
    if are_equal:
        output.weight = first
        return
    tied = {output.weight.data_ptr(), first.data_ptr()}
    for module in merged.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.data_ptr() in tied:
            module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
