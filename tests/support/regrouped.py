"""Texts of rows that are put together again and again, beside those of each row alone."""

from __future__ import annotations

import torch

from left_trainer.evaluation.batches import without_filling
from left_trainer.evaluation.generation import generate_completions
from left_trainer.evaluation.regrouping import STAGE, Regrouping, inspecting
from left_trainer.models import model_family
from tiny import tiny_model

ENDS = list(range(1, 300, 12))  # rows end at unlike steps
NEW_TOKENS = 3 * STAGE + 3
LENGTHS = (3, 5, 5, 8, 9, 11, 14, 17, 4, 12)


def lively_model(model_type, **overrides):
    """A model whose every token depends on all before it, and on the source; one as it is made repeats itself."""
    model = tiny_model(model_type, **overrides)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.1 if 300 in parameter.shape else 1.0, generator=generator)
    return model


def rows_of_ids(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randint(3, 300, (length,), generator=generator) for key, length in enumerate(LENGTHS)}


def generated(model, rows, keys, **arguments):
    if model_family(model) == "decoder_only":
        return generate_completions(model, [rows[key] for key in keys], 0, **arguments)
    ids = torch.nn.utils.rnn.pad_sequence([rows[key] for key in keys], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(rows[key]) for key in keys], batch_first=True)
    return model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **arguments)


def settings(**overrides):
    return {"max_new_tokens": NEW_TOKENS, "eos_token_id": ENDS, "do_sample": False, **overrides}


def texts_alone(model, rows, **arguments):
    texts = {key: generated(model, rows, [key], **arguments)[0].numpy() for key in rows}
    return {key: without_filling(ids, arguments["eos_token_id"], 0).tolist() for key, ids in texts.items()}


def regrouped(model, rows, batch_size=3, reader=None, **arguments):
    """Texts by row."""
    regrouping = Regrouping({key: len(row) for key, row in rows.items()}, batch_size, NEW_TOKENS, 0, reader)
    for keys in regrouping.batches():
        generated(model, rows, keys, custom_generate=regrouping.decoding(keys), **arguments)
        assert regrouping._waiting_tokens() <= regrouping.most_tokens
    assert not regrouping.waiting
    return {key: without_filling(ids, arguments["eos_token_id"], 0).tolist() for key, ids in regrouping.texts.items()}


def reason(model, rows, **arguments):
    found = []
    generated(model, rows, [0], custom_generate=inspecting(found), **arguments)
    return found[0]
