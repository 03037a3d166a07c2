"""Our tuners are known to PEFT as soon as both packages are imported, in either order."""

from __future__ import annotations

import subprocess
import sys

import pytest
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from left_trainer.tuners.bottleneck import HoulsbyAdapterConfig
from left_trainer.tuners.registration import peft_type, register_tuners
from processes import ENVIRONMENT
from tiny import tiny_model

OURS = {
    "BITFIT",
    "HOULSBY_ADAPTER",
    "LAYERS",
    "PARALLEL_ADAPTER",
    "PARAMETER_TYPES",
    "PFEIFFER_ADAPTER",
    "P_TUNING_V2",
}
REPLACED = {"MULTITASK_PROMPT_TUNING", "PROMPT_TUNING", "P_TUNING"}
LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({base!r})
print(type(PeftModel.from_pretrained(model, {adapter!r}).active_peft_config).__name__)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    base, adapter = (str(tmp_path_factory.mktemp(name)) for name in ("base", "adapter"))
    model = tiny_model("llama")
    model.save_pretrained(base)
    get_peft_model(model, HoulsbyAdapterConfig(task_type="CAUSAL_LM")).save_pretrained(adapter)
    return LOAD.format(base=base, adapter=adapter)


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT)


@pytest.mark.parametrize(
    "imports", ["import left_trainer\nfrom peft import PeftModel", "from peft import PeftModel\nimport left_trainer"]
)
def test_adapters_load_after_both_imports(imports, saved):
    result = run(imports + saved)
    assert result.stdout.strip() == "HoulsbyAdapterConfig", result.stderr


def test_without_the_import_peft_names_the_type(saved):
    result = run("from peft import PeftModel" + saved)
    assert result.returncode != 0
    assert "HOULSBY_ADAPTER" in result.stderr


def test_registering_twice_changes_nothing():
    assert set(PeftType.__members__) >= OURS
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register_tuners()
    assert before == PEFT_TYPE_TO_CONFIG_MAPPING
    assert peft_type("houlsby_adapter") is PeftType("HOULSBY_ADAPTER")


def test_every_tuner_of_ours_is_registered():
    ours = {kind: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if "left_trainer" in config.__module__}
    replaced = {kind.value for kind, config in ours.items() if hasattr(config, "replaces")}
    assert replaced == REPLACED
    assert {kind.value for kind in ours} - replaced == OURS
    for kind, config in ours.items():
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[kind]
        assert tuner.__module__.startswith("peft." if kind.value in REPLACED else "left_trainer."), kind
        if kind.value in REPLACED:
            assert issubclass(config, config.replaces)
            assert config.replaces.__module__.startswith("peft.")
