"""A model with the tokens of some texts alone computes what it did."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from left_trainer.compression import trim_vocabulary
from left_trainer.compression.vocabulary_tables import named_ids, tables_of
from left_trainer.embedded import MODEL_PATHS
from left_trainer.models import load_model
from left_trainer.models.source import ModelSource
from places import SHARED
from tiny import DECODER_ONLY_TYPES, EMBEDDING_CONFIGS, ENCODER_DECODER_TYPES, fsmt_model, tiny_model
from tokenizer_kinds import NAMED, corpus, unigram_with_bytes

SLOW_TO_BUILD = ("mamba", "rwkv", "gpt_oss")  # and with one table, as the others
TYPES = [name for name in (*ENCODER_DECODER_TYPES, *DECODER_ONLY_TYPES) if name not in SLOW_TO_BUILD]
OTHER_TABLES = [name for name in EMBEDDING_CONFIGS if name != "fsmt"]
DATA = corpus(seed=5, size=6)
ROWS = 400  # more than the tokenizer has tokens


@functools.cache
def whole_tokenizer() -> PreTrainedTokenizerFast:
    return unigram_with_bytes()


def with_biases(model: Any) -> Any:
    """Whatever is added to the logits is not zero."""
    torch.manual_seed(1)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        head.bias.data.normal_()
    return model


@torch.no_grad()
def logits_of(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("model_type", [*TYPES, *OTHER_TABLES])
def test_logits_are_those_of_the_kept_tokens(model_type, tmp_path):
    sizes = {"decoder_vocab_size": ROWS - 10} if model_type == "own_table_marian" else {}
    model = with_biases(tiny_model(model_type, vocab_size=ROWS, **sizes))
    before = copy.deepcopy(model)
    vocabulary = trim_vocabulary(model, whole_tokenizer(), DATA)
    assert vocabulary.size_before == ROWS
    assert vocabulary.size_after < len(whole_tokenizer())
    expected = logits_of(before, whole_tokenizer(), DATA)[..., vocabulary.kept_ids]
    found = logits_of(model, vocabulary.tokenizer, DATA)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    torch.testing.assert_close(logits_of(loaded.eval(), vocabulary.tokenizer, DATA), found, rtol=0, atol=0)
    assert loaded.num_parameters() == model.num_parameters() < before.num_parameters()


@pytest.mark.parametrize("model_type", ["t5", "mt5", "bart", "own_table", "llama", "qwen2"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_rows_are_the_same_bits_and_ties_stay(model_type, is_tied):
    model = tiny_model(model_type, vocab_size=ROWS, tie_word_embeddings=is_tied)
    before = {table.name: table.tensor.detach().clone() for table in tables_of(model)}
    names = {id(table.tensor) for table in tables_of(model)}
    kept = trim_vocabulary(model, whole_tokenizer(), DATA).kept_ids
    after = tables_of(model)
    assert {id(table.tensor) for table in after} == names
    for table in after:
        assert torch.equal(table.tensor, before[table.name].index_select(table.dim, torch.tensor(kept)))


@pytest.mark.parametrize("family", MODEL_PATHS)
def test_embedded_models_write_the_same(family):
    """Where the whole model may write kept tokens alone; the trimmed one has no others."""
    source = ModelSource.of(str(MODEL_PATHS[family]))
    before, tokenizer = load_model(source).eval(), AutoTokenizer.from_pretrained(source.model)
    model, texts = copy.deepcopy(before), ["summarize: the red house is near the river", "a green tree and a dog"]
    vocabulary = trim_vocabulary(model, tokenizer, texts)
    expected = logits_of(before, tokenizer, texts)[..., vocabulary.kept_ids]
    torch.testing.assert_close(logits_of(model, vocabulary.tokenizer, texts), expected, rtol=0, atol=1e-6)
    dropped = sorted({*range(before.config.vocab_size)} - {*vocabulary.kept_ids})
    assert dropped
    options = {"max_new_tokens": 12, "num_beams": 1}
    written = [
        written_by(before, tokenizer, texts, suppress_tokens=dropped, **options),
        written_by(model, vocabulary.tokenizer, texts, **options),
    ]
    assert written[0] == written[1]
    assert any(written[1])


def written_by(model: Any, tokenizer: Any, texts: list[str], **options: Any) -> list[str]:
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    return [tokenizer.decode(model.generate(each, **options)[0], skip_special_tokens=True) for each in ids]


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("aren-transliteration", ["محمد", "muhammad", "آتشيسون", "acheson"]),
        ("stories260K", ["Once upon a time, a cat"]),
    ],
)
def test_real_models_compute_the_same(name, texts):
    if not (SHARED / "models" / name).is_dir():
        pytest.skip("needs the shared models")
    path = str(SHARED / "models" / name)
    before, tokenizer = load_model(path).eval(), AutoTokenizer.from_pretrained(path)
    model = copy.deepcopy(before)
    vocabulary = trim_vocabulary(model, tokenizer, texts)
    expected = logits_of(before, tokenizer, texts)[..., vocabulary.kept_ids]
    torch.testing.assert_close(logits_of(model, vocabulary.tokenizer, texts), expected, rtol=0, atol=1e-6)


# Ids that configs name


def reordered_tokenizer() -> PreTrainedTokenizerFast:
    """Its special tokens are the last ones, so that all of their ids move."""
    vocabulary = {token: number for number, token in enumerate([*"abcdefgh", "abc", "def", *NAMED.values()])}
    merges = [("a", "b"), ("ab", "c"), ("d", "e"), ("de", "f")]
    vocabulary |= {"ab": len(vocabulary), "de": len(vocabulary) + 1}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)


def test_ids_that_configs_name_are_renamed():
    tokenizer = reordered_tokenizer()
    whole = tokenizer.get_vocab()
    special = {"pad_token_id": whole["<pad>"], "eos_token_id": whole["</s>"], "bos_token_id": whole["<s>"]}
    model = tiny_model("bart", vocab_size=40, decoder_start_token_id=whole["</s>"], **special)
    model.generation_config = GenerationConfig(
        **special,
        decoder_start_token_id=whole["</s>"],
        forced_bos_token_id=whole["def"],
        suppress_tokens=[30],
        bad_words_ids=[[whole["a"], whole["b"]]],
        sequence_bias=[[[whole["c"]], 1.0]],
    )
    model.config.task_specific_params = {"summarization": {"forced_bos_token_id": whole["<s>"], "num_beams": 4}}
    vocabulary = trim_vocabulary(model, tokenizer, ["abc"])
    new, config = vocabulary.tokenizer.get_vocab(), model.generation_config
    assert "def" in new
    assert 30 in vocabulary.kept_ids[len(new) :]
    assert (config.pad_token_id, config.eos_token_id) == (new["<pad>"], new["</s>"])
    assert config.forced_bos_token_id == new["def"]
    assert config.bad_words_ids == [[new["a"], new["b"]]]
    assert config.sequence_bias == [[[new["c"]], 1.0]]
    assert [vocabulary.kept_ids[number] for number in config.suppress_tokens] == [30]
    inner = model.config
    assert (inner.pad_token_id, inner.decoder_start_token_id) == (new["<pad>"], new["</s>"])
    assert inner.task_specific_params["summarization"] == {"forced_bos_token_id": new["<s>"], "num_beams": 4}
    assert model.get_input_embeddings().padding_idx == new["<pad>"]
    assert inner.vocab_size == vocabulary.size_after == model.get_input_embeddings().num_embeddings


def test_ids_without_a_row_are_left_alone():
    """GPT-2's config names 50256 by default."""
    model = tiny_model("gpt2", vocab_size=ROWS, eos_token_id=50256)
    trim_vocabulary(model, whole_tokenizer(), DATA)
    assert model.config.eos_token_id == 50256


def test_named_ids_looks_into_configs_inside():
    config = tiny_model("bart").config
    config.forced_decoder_ids, config.pad_token_id = [[1, 17], [2, 18]], -1
    assert {17, 18} <= named_ids(config)
    assert -1 not in named_ids(config)


# What cannot be trimmed


def test_nothing_changes_where_a_model_is_refused():
    tokenizer = whole_tokenizer()
    small = tiny_model("t5", vocab_size=100)
    before = {name: weight.clone() for name, weight in small.state_dict().items()}
    with pytest.raises(ValueError, match="rows for tokens"):
        trim_vocabulary(small, tokenizer, DATA)
    assert all(torch.equal(weight, before[name]) for name, weight in small.state_dict().items())
    assert small.config.vocab_size == 100


def test_an_adapter_is_refused():
    model = get_peft_model(tiny_model("t5", vocab_size=ROWS), LoraConfig(target_modules=["q"]))
    for each in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="before an adapter"):
            trim_vocabulary(each, whole_tokenizer(), DATA)


@pytest.mark.parametrize("make", [lambda: tiny_model("m2m_100"), fsmt_model])
def test_positions_that_are_counted_from_the_padding_are_refused_where_it_moves(make):
    model, tokenizer = make(), reordered_tokenizer()
    model.config.pad_token_id = tokenizer.pad_token_id
    for module in model.modules():
        if isinstance(vars(module).get("padding_idx"), int):
            module.padding_idx = tokenizer.pad_token_id
    with pytest.raises(ValueError, match="counts positions"):
        trim_vocabulary(model, tokenizer, ["a"])
