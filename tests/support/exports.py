"""Folders of runs with a trained adapter, made without a training, and the tokenizers that export formats need."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from left_trainer import apply_method
from left_trainer.adapters.base_model import mark_changed
from left_trainer.evaluation.generation import write_generation_config
from left_trainer.export.exporting import Export, Exported, export_model
from left_trainer.export.rows import RowsAsked
from left_trainer.methods.saving import save_adapter
from left_trainer.models import load_model
from tiny import ENCODER_DECODER_TYPES, tiny_model, tiny_rows, tiny_tokenizer

NEW_TOKENS = 6


def marian_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with padding as the last token, where Marian's is."""
    state = json.loads(tiny_tokenizer("encoder_decoder").backend_tokenizer.to_str())["model"]
    tokens = [token for token in sorted(state["vocab"], key=state["vocab"].get) if token != "<pad>"] + ["<pad>"]
    merges = [tuple(pair) for pair in state["merges"]]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = [("</s>", tokens.index("</s>"))]
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>", model_max_length=128
    )


def make_base(folder: Path, model_type: str, tokenizer: PreTrainedTokenizerBase | None = None, **config: Any) -> Path:
    """A tiny base model with its tokenizer, whose special tokens the config names."""
    is_encoder_decoder = model_type in ENCODER_DECODER_TYPES
    if tokenizer is None:
        tokenizer = tiny_tokenizer("encoder_decoder" if is_encoder_decoder else "decoder_only")
    else:
        names = ("pad_token_id", "eos_token_id", "bos_token_id")
        config = {**{name: getattr(tokenizer, name) for name in names}, "vocab_size": len(tokenizer), **config}
        if is_encoder_decoder:
            config = {"decoder_start_token_id": tokenizer.pad_token_id, **config}
    tiny_model(model_type, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_run(
    folder: Path, base: Path, method: str = "lora", options: Any = None, size: float = 0.2, changed: bool = False
) -> Path:
    """A run's folder with an adapter whose weights are random.

    Args:
        folder: New.
        base: Folder of the base model.
        method: That is applied.
        options: `peft_kwargs`.
        size: Of what is added to the trained weights.
        changed: Whether the base is to be saved beside the adapter.
    """
    model = apply_method(load_model(str(base)), method, options or {})
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * size)
    if changed:
        mark_changed(model)
    save_adapter(model, folder)
    generation = copy.deepcopy(model.get_base_model().generation_config)
    generation.max_new_tokens = NEW_TOKENS
    write_generation_config(generation, folder)
    for file in (*base.glob("*token*"), *base.glob("vocab*")):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def write_rows(folder: Path, number: int = 4) -> Path:
    """A file of test rows."""
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"document": r["prompt"], "summary": "x"}) for r in tiny_rows(number)))
    return file


def export(run: Path, to: str, output: Path, **options: Any) -> Exported:
    """Export and verify on four rows."""
    rows = RowsAsked(str(write_rows(output.parent)), "summarization", number=4)
    return export_model(Export(str(run), to, str(output), rows=rows, max_new_tokens=NEW_TOKENS, **options))
