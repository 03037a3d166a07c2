"""GGUF holds what the trained model computes: read by llama.cpp where it is installed, and by transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest

import tokenizer_kinds
from exports import export, make_base, make_run
from left_trainer.export import gguf_model, to_gguf
from left_trainer.export.gguf_tokenizer import GgufTokenizer
from left_trainer.models import load_tokenizer
from tiny import tiny_model

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore:Model (has|with) (the )?`tie_word_embeddings=True`")
LLAMA_3 = {
    **{"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama": ("llama", None, {}),
    "llama-tied-sentencepiece": ("llama", tokenizer_kinds.llama, {"tie_word_embeddings": True}),
    "llama-biases": ("llama", None, {"attention_bias": True}),
    "llama-3": ("llama", None, {"rope_parameters": LLAMA_3}),
    "llama-narrow-heads": ("llama", None, {"head_dim": 4}),
    "mistral": ("mistral", None, {}),
    "qwen2": ("qwen2", None, {}),
    "gpt2": ("gpt2", None, {}),
}
READ_BY_TRANSFORMERS = ("llama", "qwen2", "gpt2")


@pytest.fixture
def reader(request, monkeypatch):
    """Who reads the file in the verification."""
    if request.param == "llama.cpp":
        pytest.importorskip("llama_cpp")
    else:
        monkeypatch.setattr(to_gguf, "_has_llama_cpp", lambda: False)
    return request.param


@pytest.mark.parametrize(
    ("case", "reader"),
    [*((case, "llama.cpp") for case in CASES), *((case, "transformers") for case in READ_BY_TRANSFORMERS)],
    indirect=["reader"],
)
def test_answers_are_those_of_the_trained_model(case, reader, tmp_path):
    model_type, tokenizer, config = CASES[case]
    base = make_base(tmp_path / "base", model_type, tokenizer() if tokenizer else None, **config)
    exported = export(make_run(tmp_path / "run", base), "gguf", tmp_path / "out")
    assert (exported.verification.equal, exported.precision) == (4, "f32")
    assert reader in exported.verification.runtime


@pytest.mark.parametrize(
    ("model_type", "reader"),
    [("llama", "llama.cpp"), ("gpt2", "llama.cpp"), ("llama", "transformers")],
    indirect=["reader"],
)
def test_an_adapter_alone_is_applied_to_the_base(model_type, reader, tmp_path):
    base = make_base(tmp_path / "base", model_type)
    exported = export(make_run(tmp_path / "run", base, size=1.0), "gguf", tmp_path / "out", as_adapter=True)
    assert exported.verification.equal == 4
    assert sorted(path.name for path in exported.folder.iterdir()) == ["adapter.gguf", "verification.json"]


@pytest.mark.parametrize("precision", ["f16", "bf16", "q8_0"])
def test_smaller_precisions(precision, tmp_path):
    base = make_base(tmp_path / "base", "llama", hidden_size=32, intermediate_size=64)
    run = make_run(tmp_path / "run", base)
    exported = export(run, "gguf", tmp_path / "out", precision=precision)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(exported.folder / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == precision.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_frequencies_of_llama_3_are_those_of_transformers():
    model = tiny_model("llama", rope_parameters=LLAMA_3, head_dim=32)
    plain = 10_000.0 ** (-np.arange(0, 32, 2) / 32)
    factors = gguf_model._rotation_factors(model.config)
    assert np.allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert factors.max() == pytest.approx(8.0)
    assert math.isclose(factors.min(), 1.0)


def test_tokens_have_their_kinds(tmp_path):
    tokenizer = tokenizer_kinds.llama()
    tokenizer.add_tokens(["newword"])
    found = GgufTokenizer.of(tokenizer, len(tokenizer) + 1)
    kinds = dict(zip(found.tokens, found.kinds, strict=True))
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x41>"], kinds["newword"]) == (2, 3, 6, 4)
    assert found.kinds[-1] == 5
    assert found.model == "llama"
    assert found.space_first


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [(tokenizer_kinds.unigram_with_bytes, "is a Unigram one"), (tokenizer_kinds.byte_level, None)],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(tokenizer, reason):
    if reason is None:
        assert GgufTokenizer.of(tokenizer(), 1000).split == "gpt-2"
        return
    with pytest.raises(ValueError, match=reason):
        GgufTokenizer.of(tokenizer(), 1000)


def test_the_embedded_model_is_tokenized_alike():
    tokenizer = load_tokenizer("left_trainer/embedded/llama")
    assert GgufTokenizer.of(tokenizer, 2048).merges[0] == "Ġ a"
