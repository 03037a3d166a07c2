"""Rows that go on in other batches are given the same texts as by `generate` alone."""

from __future__ import annotations

import pytest

from left_trainer.evaluation.regrouping import STAGE
from regrouped import generated, lively_model, reason, regrouped, rows_of_ids, settings, texts_alone
from tiny import DECODER_ONLY_TYPES, ENCODER_DECODER_TYPES, tiny_model

REGROUPED_TYPES = [
    *(name for name in ENCODER_DECODER_TYPES if name != "blenderbot"),
    *(name for name in DECODER_ONLY_TYPES if name not in ("mamba", "rwkv")),
]


def check(model, rows, **arguments):
    texts = texts_alone(model, rows, **arguments)
    lengths = {len(text) for text in texts.values()}
    assert len(lengths) > 1
    assert max(lengths) > STAGE + 1  # or none would wait
    assert reason(model, rows, **arguments) is None
    assert regrouped(model, rows, **arguments) == texts


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("model_type", REGROUPED_TYPES)
def test_every_model_writes_what_it_writes_for_a_row_alone(model_type, num_beams):
    check(lively_model(model_type), rows_of_ids(), **settings(num_beams=num_beams))


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("model_type", ["mistral", "gpt_oss"])
def test_what_is_outside_of_a_window_stays_there(model_type, num_beams):
    model = lively_model(model_type, sliding_window=7)
    check(model, rows_of_ids(), **settings(num_beams=num_beams))


OF_BOTH = {
    "min_length": {"min_length": 13},
    "min_new_tokens": {"min_new_tokens": 12},
    "forced_bos_token_id": {"forced_bos_token_id": 40},
    "forced_eos_token_id": {"forced_eos_token_id": 1},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "suppress_tokens": {"suppress_tokens": list(range(40, 90))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(1, 300, 2))},
    "bad_words_ids": {"bad_words_ids": [[50], [61, 62]]},
    "sequence_bias": {"sequence_bias": [[[40], 2.0], [[41, 42], 3.0]]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (10, 1.2)},
    "renormalize_logits": {"renormalize_logits": True, "suppress_tokens": [40, 41]},
    "remove_invalid_values": {"remove_invalid_values": True},
    "max_length": {"max_length": 21, "max_new_tokens": None},
}
OF_BEAMS = {
    "long": {"length_penalty": 2.0},
    "short": {"length_penalty": -1.0},
    "early": {"early_stopping": True},
    "never": {"early_stopping": "never"},
    "never, long": {"early_stopping": "never", "length_penalty": 0.5},
    "one end": {"eos_token_id": [13]},
}
SETTINGS = {
    **{f"{name}, {beams}": {**values, "num_beams": beams} for name, values in OF_BOTH.items() for beams in (1, 3)},
    **{name: {**values, "num_beams": 4} for name, values in OF_BEAMS.items()},
}


@pytest.fixture(scope="module")
def bart():
    return lively_model("mbart")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_followed(name, bart):
    arguments = settings(**SETTINGS[name])
    rows = rows_of_ids()
    assert reason(bart, rows, **arguments) is None
    assert regrouped(bart, rows, **arguments) == texts_alone(bart, rows, **arguments)


NOT_REGROUPED = {
    "another search than greedy or beam search": ("t5", {"do_sample": True}),
    "return_dict_in_generate=True": ("t5", {"return_dict_in_generate": True}),
    "there is no cache": ("t5", {"use_cache": False}),
    "the cache is a StaticCache": ("t5", {"cache_implementation": "static"}),
    "scores are changed by EncoderNoRepeatNGramLogitsProcessor": ("blenderbot", {}),
    "scores are changed by EncoderRepetitionPenaltyLogitsProcessor": ("t5", {"encoder_repetition_penalty": 1.2}),
    "scores are changed by PrefixConstrainedLogitsProcessor": (
        "t5",
        {"prefix_allowed_tokens_fn": lambda batch, ids: [1, 2, 3]},
    ),
    "scores are changed by MinLengthLogitsProcessor": ("llama", {"min_new_tokens": 3}),
    "MaxTimeCriteria stops a text": ("t5", {"max_time": 60.0}),
    "MambaForCausalLM prepares its inputs in its own way": ("mamba", {}),
}


@pytest.mark.parametrize("expected", NOT_REGROUPED)
def test_what_is_not_regrouped_is_named(expected):
    model_type, arguments = NOT_REGROUPED[expected]
    assert reason(tiny_model(model_type), rows_of_ids(), **settings(**arguments)) == expected


def test_a_cache_that_is_given_is_left_alone():
    model, rows = tiny_model("llama"), rows_of_ids()
    cache = model(rows[7][None, :5], use_cache=True).past_key_values
    assert reason(model, {0: rows[7]}, past_key_values=cache, **settings()) == "a cache is given"


@pytest.mark.parametrize("num_beams", [1, 3])
def test_steps_are_saved_and_memory_is_kept(num_beams, monkeypatch):
    model, rows = lively_model("pegasus"), rows_of_ids()
    steps = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, *args, **kwargs: steps.append(1) or forward(self, *args, **kwargs)
    )
    regrouped(model, rows, num_beams=num_beams, **settings())
    ours, steps[:] = len(steps), []
    for keys in ([7, 6], [9, 5], [4, 3], [2, 1], [8, 0]):
        generated(model, rows, keys, num_beams=num_beams, **settings())
    assert ours < 0.8 * len(steps)
