"""The embedding tables of a model: which ones it reads."""

from __future__ import annotations

from collections import Counter

from torch import nn
from transformers import PreTrainedModel


def unread_tables(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    """Embeddings, by name, that no computation reads.

    Encoder and decoder each read a table inside of them. The model's `shared` one stands beside them, and where they
    have weights of their own (a Marian with two vocabularies, a Blenderbot, an untied BART), it is left over.
    """
    holders = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return {name: module for name, module in bypassed_tables(model).items() if holders[id(module.weight)] == 1}


def bypassed_tables(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    """Embeddings, by name, that are never called: encoder and decoder have modules of their own, with their weight."""
    if not model.config.is_encoder_decoder:
        return {}
    inside = {id(module) for part in (model.get_encoder(), model.get_decoder()) for module in part.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and id(module) not in inside
    }


def separate_token_tables(model: PreTrainedModel) -> list[str]:
    """Names of the embeddings of encoder and decoder, where these have weights of their own; empty otherwise."""
    parts = (model.get_encoder(), model.get_decoder()) if model.config.is_encoder_decoder else ()
    owned = [part.get_input_embeddings() for part in parts if hasattr(part, "get_input_embeddings")]
    tables = [model.get_input_embeddings(), *owned]
    unread = {id(module) for module in unread_tables(model).values()}
    by_weight = {id(table.weight): table for table in reversed(tables) if id(table) not in unread}
    chosen = {id(table) for table in by_weight.values()} if len(by_weight) > 1 else set()
    return [name for name, module in model.named_modules() if id(module) in chosen]
