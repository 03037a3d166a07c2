"""What prompts have in common is read once, and each row is given the text that it is given alone."""

from __future__ import annotations

import pytest
import torch

from left_trainer import list_methods
from left_trainer.evaluation import prompt_reading
from left_trainer.evaluation.generation import why_not_batched
from left_trainer.evaluation.prompt_reading import LEAST_TOKENS, PromptReader
from left_trainer.evaluation.regrouping import why_not_with_adapter
from left_trainer.kernels.fast_paths import FastPath
from method_settings import apply_or_skip
from regrouped import lively_model, reason, regrouped, settings, texts_alone
from tiny import DECODER_ONLY_TYPES, tiny_model

IN_COMMON = 20
NOT_ENOUGH = f"the prompts of a batch have fewer than {LEAST_TOKENS} first tokens in common"
TYPES = [name for name in DECODER_ONLY_TYPES if name not in ("mamba", "rwkv")]


def ids(length, seed):
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed))


def rows_with_prefix():
    """Rows that begin alike, with those that do not, and those that are the beginning of others."""
    prefix = ids(IN_COMMON, seed=99)
    rows = [torch.cat([prefix, ids(length, seed=length)]) for length in (3, 9, 14, 5, 11, 2, 17, 4)]
    rows += [prefix, prefix[:6], torch.cat([prefix[:18], ids(9, seed=8)]), torch.cat([prefix, prefix]), ids(17, seed=7)]
    return dict(enumerate(rows))


def texts_read_once(model, rows, **arguments):
    path = FastPath()
    return regrouped(model, rows, reader=PromptReader(path), **arguments), path


def check(model, rows=None, batch_size=3, **arguments):
    rows = rows or rows_with_prefix()
    with torch.no_grad():
        alone = texts_alone(model, rows, **arguments)
        texts, path = texts_read_once(model, rows, batch_size=batch_size, **arguments)
    assert len({tuple(text) for text in alone.values()}) > len(rows) / 2  # prompts are read, and differ
    assert texts == alone
    return path


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("model_type", TYPES)
def test_every_model_writes_what_it_writes_for_a_row_alone(model_type, num_beams):
    path = check(lively_model(model_type), **settings(num_beams=num_beams))
    assert path.ran > 1
    assert set(path.fell_back) == {NOT_ENOUGH}  # batches with a row that begins otherwise


@pytest.mark.parametrize("window", [7, 18, 30])
@pytest.mark.parametrize("model_type", ["mistral", "gpt_oss", "gemma2"])
def test_no_more_is_kept_than_a_window_holds(model_type, window):
    path = check(lively_model(model_type, sliding_window=window), **settings())
    assert (path.ran > 0) == (window > LEAST_TOKENS)


METHODS = [method.name for method in list_methods() if "decoder_only" in method.model_families]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_reads_prompts_in_parts(method, tmp_path):
    model = apply_or_skip(method, "llama", tmp_path, seed=0).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude" not in name:
            parameter.data += 0.2 * torch.randn(parameter.shape)  # adapters begin as nothing
    rows = dict(enumerate(row for key, row in rows_with_prefix().items() if key % 3))
    with torch.no_grad():
        if why_not_batched(model, 0) or why_not_with_adapter(model) or reason(model, rows, **settings()):
            return
    assert check(model, rows, **settings()).ran


def test_a_prompt_is_read_once_for_all_rows_and_beams(monkeypatch):
    model = lively_model("llama")
    tokens, forward = [], type(model).forward

    def counted(self, *args, **kwargs):
        tokens.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    rows = {key: torch.cat([ids(40, seed=1), ids(4, seed=key)]) for key in range(12)}
    options = settings(max_new_tokens=1, num_beams=3)
    texts_read_once(model, rows, batch_size=4, **options)
    assert sum(tokens) == 40 + 12 * 4
    tokens.clear()
    regrouped(model, rows, batch_size=4, **options)
    assert sum(tokens) == 3 * 12 * 44


def test_rows_that_come_singly_are_read_once():
    path = check(lively_model("llama"), batch_size=1, **settings())
    assert path.ran > 5


def test_few_tokens_are_read_for_each_row():
    rows = {key: torch.cat([ids(LEAST_TOKENS - 1, seed=1), ids(6, seed=key)]) for key in range(6)}
    _, path = texts_read_once(tiny_model("llama"), rows, **settings())
    assert path.report() == {"ran": 0, "fell_back": {NOT_ENOUGH: path.fell_back[NOT_ENOUGH]}}


def test_what_is_kept_becomes_what_most_of_the_later_rows_begin_with(monkeypatch):
    monkeypatch.setattr(prompt_reading, "LEAST_TOKENS", 2)
    first, second = ids(12, seed=1), torch.cat([ids(5, seed=1), ids(15, seed=2)])
    rows = {key: torch.cat([prefix, ids(4, seed=key)]) for key, prefix in enumerate([second] * 3 + [first] * 3)}
    assert check(lively_model("llama"), rows, **settings()).ran == 2
