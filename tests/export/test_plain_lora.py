"""An adapter as a plain LoRA computes what the adapter computes, for every method that says so."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from exports import export, make_base, make_run
from left_trainer import get_method, list_methods
from left_trainer.export.formats import formats_of
from left_trainer.methods.plain_lora import lora_kind, may_be_lora, plain_lora
from left_trainer.models import FAMILIES, auto_class, model_family
from left_trainer.runs.inference import Generator
from left_trainer.runs.merging import probe
from method_settings import SETTINGS, apply_or_skip
from tiny import FAMILY_TYPES, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
    pytest.mark.filterwarnings("ignore:Model (has|with) (the )?`tie_word_embeddings=True`"),
]
EXACT = (
    *("lora", "rslora", "lora_plus", "lora_fa", "pissa", "olora", "corda", "lora_ga", "eva", "adalora"),
    *("qlora", "loftq"),
)
APPROXIMATE = (
    *("psoft", "loha", "lokr", "vera", "randlora", "vblora", "unilora", "tinylora", "gralora", "delora", "miss"),
    *("fourierft", "waveft", "c3a"),
)
TYPES = [*FAMILY_TYPES.values(), "gpt2"]


@pytest.mark.parametrize("method", [method.name for method in list_methods() if method.config_class])
def test_it_computes_the_same(method, tmp_path):
    """With all singular values; and methods that no LoRA holds say so."""
    if get_method(method).quantization:
        pytest.skip("is LoRA on a quantized base, as lora is on a whole one")
    applied = 0
    for model_type in TYPES:
        try:
            model = apply_or_skip(method, model_type, tmp_path)
        except pytest.skip.Exception:
            continue
        applied += 1
        kind = lora_kind(model)
        if model_type != "gpt2":  # for whose layers PEFT converts fewer methods
            assert kind == ("exact" if method in EXACT else "approximate" if method in APPROXIMATE else None)
        if kind is None:
            continue
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) * 0.05)
        family = model_family(model)
        wanted = probe(model, family)
        if hasattr(model, "initial_adapter"):  # a part of the base is in the adapter, until it is saved
            model.save_pretrained(tmp_path / f"saved-{model_type}")
            model = PeftModel.from_pretrained(tiny_model(model_type), tmp_path / f"saved-{model_type}")
        lora = plain_lora(model, 1.0)
        lora.write(tmp_path, "base", model.active_peft_config.task_type)
        loaded = PeftModel.from_pretrained(tiny_model(model_type), tmp_path)
        assert torch.allclose(probe(loaded, family), wanted, atol=5e-3), model_type
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (lora.rank, lora.rank, {})
        shapes = {t.shape[0] for n, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in n}
        assert shapes == {lora.rank}
    if not applied:
        pytest.skip(f"{method} is for another model")


def test_what_a_method_exports_to_follows_from_its_record():
    for method in list_methods():
        kind = "exact" if method.name in EXACT else "approximate" if method.name in APPROXIMATE else None
        formats = formats_of(method, kind)
        assert ("lora" in formats) == (kind is not None)
        assert ("merged" in formats) == method.mergeable
        assert ("ctranslate2" in formats) == (method.mergeable or method.config_class is None)
        assert kind is None or may_be_lora(method)


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_and_scalings_of_layers_become_one(family, tmp_path):
    """Engines read one rank and one scaling for all layers; `rank_pattern` would be scaled wrong without a word."""
    base = make_base(tmp_path / "base", FAMILY_TYPES[family])
    options = {"r": 2, "lora_alpha": 12, "rank_pattern": {r"(q|q_proj)": 5}, "alpha_pattern": {r"(v|v_proj)": 3}}
    exported = export(make_run(tmp_path / "run", base, options=options, size=0.5), "lora", tmp_path / "out")
    assert exported.verification.equal == 4
    config = json.loads((exported.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"], config["use_rslora"]) == (5, 5, {}, False)
    model = auto_class(family).from_pretrained(base)
    assert (("vllm serve" in exported.usage) and "--max-lora-rank 8" in exported.usage) == (family == "decoder_only")
    assert PeftModel.from_pretrained(model, exported.folder).peft_config["default"].r == 5


def test_a_rank_bounds_an_approximation(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    run = make_run(tmp_path / "run", base, "loha", size=0.02)
    exported = export(run, "lora", tmp_path / "out", rank=3)
    assert json.loads((exported.folder / "adapter_config.json").read_text())["r"] == 3
    with pytest.raises(ValueError, match="larger than the weight shape"):
        export(run, "lora", tmp_path / "other", rank=999)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("to", ["lora", "ctranslate2"])
def test_a_base_that_was_changed_is_exported_with_its_adapter(to, family, tmp_path):
    """Also from where both were moved to."""
    if to == "ctranslate2":
        pytest.importorskip("ctranslate2")
    base = make_base(tmp_path / "base", FAMILY_TYPES[family])
    make_run(tmp_path / "before", base, changed=True)
    for file in base.iterdir():
        file.unlink()
    run = (tmp_path / "before").rename(tmp_path / "run")
    exported = export(run, to, tmp_path / "out")
    assert exported.verification.equal == 4
    if to == "lora":
        moved = exported.folder.rename(tmp_path / "moved")
        (run / "base").rename(tmp_path / "gone")
        texts = ["Repeat 3 now:", "Repeat 44 and so on now:"]
        assert all(Generator(str(moved), max_new_tokens=4)(texts))


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("dora", {}, "two low-rank factors cannot hold"),
        ("lora", {"modules_to_save": ["lm_head"]}, "trained more than"),
        ("lora", {"bias": "all"}, "trained more than"),
        ("ln_tuning", {}, "two low-rank factors cannot hold"),
    ],
)
def test_what_no_lora_holds_is_refused(method, options, reason, tmp_path):
    base = make_base(tmp_path / "base", "gpt2" if "bias" in options else "llama", tie_word_embeddings=False)
    run = make_run(tmp_path / "run", base, method, options)
    with pytest.raises(ValueError, match=rf"cannot be written as a plain LoRA: .*{reason}.*--to merged"):
        export(run, "lora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_method_of_the_lists_is_registered():
    assert {*EXACT, *APPROXIMATE} <= set(SETTINGS)
