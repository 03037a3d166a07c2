"""Applying a method: counts, targets, options, seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any, Literal, get_args

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import MT5Config, MT5ForConditionalGeneration

from left_trainer import PeftMethod, apply_method, get_method, list_methods, register_method
from left_trainer.methods.apply import apply_config
from left_trainer.methods.method import Feature
from left_trainer.methods.options import check_peft_kwargs, matches, option_types, parse_peft_kwargs
from left_trainer.methods.registry import METHODS
from left_trainer.models import model_family
from method_settings import settings
from tiny import CONFIGS, tiny_model

# Shape of bigscience/mt0-large.
MT0_LARGE = {
    "vocab_size": 250112,
    "d_model": 1024,
    "d_kv": 64,
    "d_ff": 2816,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 16,
    "feed_forward_proj": "gated-gelu",
}
MT0_LARGE_COUNTS = {
    ("lora", "r=8"): 2_359_296,
    ("prompt_tuning", "num_virtual_tokens=20"): 40_960,
    ("p_tuning", "num_virtual_tokens=20,encoder_hidden_size=128"): 320_768,
    ("prefix_tuning", "num_virtual_tokens=20"): 983_040,
    ("ia3", ""): 282_624,
}


@pytest.mark.parametrize(("method", "options"), list(MT0_LARGE_COUNTS))
def test_mt0_large_counts(method, options):
    with torch.device("meta"):
        model = MT5ForConditionalGeneration(MT5Config(**MT0_LARGE))
    applied = apply_method(model, method, options)
    trainable = sum(parameter.numel() for parameter in applied.parameters() if parameter.requires_grad)
    assert trainable == MT0_LARGE_COUNTS[method, options]


# Types on which every method has targets; on others a method may ask for them.
WITH_DEFAULTS = (
    *("bart", "blenderbot", "marian", "mbart", "mt5", "pegasus", "t5"),
    *("gpt2", "llama", "mistral", "opt", "qwen2"),
)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
@pytest.mark.parametrize("method", [method.name for method in list_methods()])
def test_every_method_finds_its_targets_or_says_why_not(method, model_type, tmp_path):
    record, plain = get_method(method), tiny_model(model_type)
    options = settings(method, model_family(plain), tmp_path).get("peft_kwargs") or {}
    needed = {name: value for name, value in options.items() if name in record.required}
    kinds = {model_family(plain)} | ({"conv1d"} if model_type == "gpt2" else set())
    refused = next((record.unsupported[kind] for kind in kinds if kind in record.unsupported), None)
    if method == "adaption_prompt" and model_type not in ("llama", "mistral", "gpt2"):
        refused = refused or "works on"
    if method == "cpt" and not refused:
        needed = record.derive_from_data(None, [5, 6, 7])
    if refused:
        with pytest.raises(ValueError, match=re.escape(refused)):
            apply_method(plain, method, needed)
        return
    if method == "xlora" and model_type != "llama":
        pytest.skip("its experts are made for the tiny Llama")
    if model_type not in WITH_DEFAULTS:
        with contextlib.suppress(ValueError):  # any other error is none that says why not
            apply_method(tiny_model(model_type), method, needed)
        return
    model = apply_method(tiny_model(model_type), method, needed)
    applied = model.applied_method
    assert applied.name == method
    assert set(applied.matched_modules) <= {name for name, _ in plain.named_modules()}
    if applied.match_table:
        assert sum(applied.match_table.values()) >= len(applied.matched_modules)
    assert isinstance(model, PeftModel) == (record.config_class is not None)


@pytest.mark.parametrize("record", list_methods(), ids=lambda record: record.name)
def test_records_are_complete(record):
    assert record.family in ("soft_prompt", "additive", "reparameterization", "selective")
    assert record.summary
    assert re.search(r"20\d\d", record.paper)
    assert record.equation
    assert record.when_to_use.endswith(".")
    assert 0 < record.learning_rate < 1
    assert record.learning_rate_source
    assert set(record.unsupported) <= set(get_args(Feature))
    assert all(reason.endswith(".") for reason in record.unsupported.values())
    if record.config_class is not None:
        assert {*record.defaults, *record.preset, *record.required} <= set(option_types(record.config_class))
    assert not set(record.hook_options) & set(option_types(record.config_class) if record.config_class else ())
    assert dataclasses.is_dataclass(record)


def test_every_type_of_peft_has_a_record():
    classes = {method.config_class for method in list_methods()}
    assert {name for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if config not in classes} == set()
    assert len(list_methods()) >= 60


def test_one_pattern_of_two_that_matches_nothing():
    with pytest.raises(ValueError, match=r"target_modules has 'w_typo'.* named .*k, .*q, .*v.*encoder\."):
        apply_method(tiny_model("t5"), "lora", {"target_modules": ["q", "w_typo"]})
    with pytest.raises(ValueError, match="modules_to_save has 'headd'"):
        apply_config(tiny_model("t5"), LoraConfig(task_type="SEQ_2_SEQ_LM", modules_to_save=["headd"]))
    with pytest.raises(ValueError, match="which matches no module"):
        apply_config(tiny_model("t5"), LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=r".*\.query"))


def test_a_regular_expression_is_counted():
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=r".*SelfAttention\.(q|v)")
    model = apply_config(tiny_model("t5"), config)
    assert model.applied_method.match_table == {config.target_modules: 8}
    linear = apply_method(tiny_model("t5"), "lora", "target_modules=all-linear")
    assert len(linear.applied_method.matched_modules) > 8


def test_no_trainable_parameter():
    with pytest.raises(ValueError, match="no trainable parameter"):
        apply_config(tiny_model("t5"), IA3Config(task_type="SEQ_2_SEQ_LM", inference_mode=True))


def test_quantized_weights_cannot_all_be_trained():
    model = tiny_model("t5")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="weights are quantized"):
        apply_method(model, "full")


def test_an_unknown_model_type_takes_the_first_candidate_that_fits():
    model = tiny_model("marian")  # PEFT has no default for it
    assert apply_method(model, "lora").applied_method.match_table == {"q_proj": 6, "v_proj": 6}
    model = tiny_model("t5")
    model.config.model_type = "novel"
    assert apply_method(model, "lora").applied_method.match_table == {"q": 6, "v": 6}


def test_the_users_config_is_not_changed():
    config = LoraConfig(task_type="SEQ_2_SEQ_LM")
    apply_config(tiny_model("t5"), config)
    assert config.target_modules is None


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_seed_repeats_peft_and_leaves_the_callers_random_state(method):
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    models = [apply_method(tiny_model_quietly(), method, seed=5) for _ in range(2)]
    assert torch.equal(torch.rand(3), expected)
    plain_base = tiny_model_quietly()
    torch.manual_seed(5)
    config = models[0].peft_config["default"]
    plain = get_peft_model(plain_base, type(config)(**{**config.to_dict(), "inference_mode": False}))
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, models[1].get_parameter(name)), name
        assert torch.equal(parameter, plain.get_parameter(name)), name


def tiny_model_quietly():
    with torch.random.fork_rng():
        return tiny_model("t5")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("", {}),
        ({"r": 4}, {"r": 4}),
        ('{"r": 4, "target_modules": ["q"]}', {"r": 4, "target_modules": ["q"]}),
        ("r=16,lora_alpha=32", {"r": 16, "lora_alpha": 32}),
        ("target_modules=q,v,r=2", {"target_modules": ["q", "v"], "r": 2}),
        ("use_rslora=true, lora_dropout=1e-1", {"use_rslora": True, "lora_dropout": 0.1}),
        ("target_modules=q", {"target_modules": ["q"]}),
        ("target_modules=all-linear", {"target_modules": "all-linear"}),
        ("init_lora_weights=pissa_niter_16", {"init_lora_weights": "pissa_niter_16"}),
    ],
)
def test_options_in_every_form(text, expected):
    assert check_peft_kwargs(get_method("lora"), text) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("rank=3", "not an option of peft_method='lora'"),
        ({"r": "8"}, "r='8' .str., but .* type int"),
        ({"r": True}, "r=True"),
        ({"r": 2.5}, "r=2.5"),
        ({"lora_dropout": "much"}, "type float"),
        ({"bias": "some"}, "bias='some'"),
        ({"use_dora": 1}, "type bool"),
        ({"target_modules": [1]}, "target_modules="),
        ({"init_lora_weights": "gaussianish"}, "init_lora_weights="),
        ({"task_type": "CAUSAL_LM"}, "'task_type', which is not an option"),
        ("{'r': 3}", "not a valid JSON object"),
        ("r 3", "cannot be read at"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        check_peft_kwargs(get_method("lora"), options)


def test_a_method_that_does_not_work_on_a_family():
    record = dataclasses.replace(
        get_method("lora"), name="only_decoders", aliases=(), unsupported={"encoder_decoder": "It is a test."}
    )
    with METHODS.temporarily(record):
        with pytest.raises(ValueError, match="It is a test"):
            apply_method(tiny_model("t5"), "only_decoders")
        assert isinstance(apply_method(tiny_model("llama"), "only_decoders"), PeftModel)


def test_names_cannot_be_taken_twice():
    with pytest.raises(ValueError, match=r"'lora' .* is already taken"):
        register_method(dataclasses.replace(get_method("ia3"), name="lora"))
    with pytest.raises(ValueError, match="already taken"):
        register_method(dataclasses.replace(get_method("ia3"), name="new", aliases=("full",)))
    assert isinstance(get_method("full_finetuning"), PeftMethod)
    assert parse_peft_kwargs("a=1") == {"a": 1}


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (1, float, True),
        (True, float, False),
        (True, int, False),
        (1.5, int, False),
        ("q", list[str] | str | None, True),
        (["q", 1], list[str], False),
        (None, int | None, True),
        ("pissa_niter_4", Literal["pissa", "pissa_niter_[number of iters]"], True),
        ("pisa", Literal["pissa"], False),
        ({"a": 1}, dict[str, int], True),
        ([1], dict[str, int], False),
        (object(), Any, True),
    ],
)
def test_what_fits_the_type_of_an_option(value, hint, fits):
    assert matches(value, hint) == fits
