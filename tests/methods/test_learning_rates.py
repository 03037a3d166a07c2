"""Default learning rates: between two widths, and beside what others measured."""

from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from left_trainer import get_method, list_methods
from left_trainer.methods.learning_rates import NARROW, WIDE, learning_rate_at, metamathqa
from left_trainer.models import ModelSource
from places import SHARED

# Runs of PEFT's benchmark whose configuration is nearest to the default of each method.
PUBLISHED = {
    "adalora": "adalora--llama-3.2-3B-rank32",
    "adaption_prompt": "adaptionprompt--llama-3.2-3B-lr_0.0005",
    "beft": "beft--llama-3.2-3B-target-v_proj",
    "c3a": "c3a--llama-3.2-3B-default",
    "deft": "deft--llama-3.2-3B-rank32",
    "fourierft": "fourierft--llama-3.2-3B-default",
    "frod": "frod--llama-3.2-3B-default",
    "full": "full-finetuning--llama-3.2-3B-lr_0.00001",
    "glora": "glora--llama-3.2-3B-vector-paths",
    "hira": "hira--llama-3.2-3B-rank32-lr4.5e-3",
    "ia3": "ia3--llama-3.2-3B-default",
    "lily": "lily--llama-3.2-3B-rank140-mlp-a2-b2-s8.0",
    "ln_tuning": "ln_tuning--llama-3.2-3B-default",
    "lokr": "lokr--llama-3.2-3B-rank32-factor4-lr0.003",
    "lora": "lora--llama-3.2-3B-rank32",
    "lora_fa": "lora--llama-3.2-3B-rank32-lorafa",
    "miss": "miss--llama-3.2-3B-default",
    "oft": "oft--llama-3.2-3B-rank32",
    "p_tuning": "ptuning--llama-3.2-3B-default",
    "peanut": "peanut--llama-3.2-3B-rank1-relu-depth0-s32.0",
    "prefix_tuning": "prefixtuning--llama-3.2-3B-tokens50-init_prefix-lr_0.005",
    "prompt_tuning": "prompt_tuning--llama-3.2-3B-sample_vocab-lr_0.001",
    "psoft": "psoft--llama-3.2-3B-default",
    "pvera": "pvera--llama-3.2-3B-rank64",
    "road": "road--llama-3.2-3B-lr_0.001",
    "tinylora": "tinylora--llama-3.2-3B-default",
    "trainable_tokens": "trainable_tokens--llama-3.2-3B-sos+eos",
    "vblora": "vblora--llama-3.2-3B-default",
    "waveft": "waveft--llama-3.2-3B-n_frequency-5000",
}

WITHOUT_ONE_WIDTH = ("blt",)  # patches and bytes have widths of their own


@pytest.mark.parametrize("method", list_methods(), ids=lambda method: method.name)
def test_the_default_falls_with_the_width_from_one_rate_to_the_other(method):
    ends = method.narrow_learning_rate, method.learning_rate
    assert (method.default_learning_rate(NARROW), method.default_learning_rate(WIDE)) == ends
    assert (method.default_learning_rate(8), method.default_learning_rate(16384)) == ends
    between = [method.default_learning_rate(width) for width in (192, 512, 768, 1024, 2048)]
    order = sorted([ends[0], *between, ends[1]], reverse=ends[0] > ends[1])
    assert order == [ends[0], *between, ends[1]]


def test_in_between_it_is_a_power_of_the_width():
    middle = round((NARROW * WIDE) ** 0.5)
    assert learning_rate_at(middle, 1e-2, 1e-4) == pytest.approx(1e-3)
    assert learning_rate_at(768, 5e-3, 5e-3) == 5e-3


@pytest.fixture(scope="module")
def published():
    file = SHARED / "published" / "peft_metamathqa.jsonl"
    if not file.is_file():
        pytest.skip("no published measurements here")
    runs = map(json.loads, file.read_text().splitlines())
    return {run["experiment"]: run for run in runs}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_default_for_wide_models_agrees_with_what_others_measured(name, published):
    method, run = get_method(name), published[PUBLISHED[name]]
    rate, accuracy = run["optimizer_kwargs"]["lr"], run["test_accuracy"]
    assert metamathqa(rate, round(100 * accuracy, 1)) in method.learning_rate_source
    # A rate that learned as well as LoRA's is right to a factor; one that learned little may be too high or too low.
    factor = 3 if accuracy > 0.4 else 10
    assert rate / factor <= method.learning_rate * 1.001 <= rate * factor * 1.002


@pytest.mark.parametrize(
    "model_type", {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
)
def test_every_model_type_has_a_width(model_type):
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception:
        pytest.skip("the config needs arguments")
    width = ModelSource("m", "m", config, "decoder_only", None, {}).width
    assert width is None if model_type in WITHOUT_ONE_WIDTH else width > 0
