"""`left-trainer methods`: the registry as a table, as JSON, and one method in full."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import get_args

import pytest

from left_trainer import apply_method, get_method, list_methods
from left_trainer.callbacks.trainable_parameters import count_parameters
from left_trainer.cli.main import main
from left_trainer.cli.method_records import LARGEST_BUILT, CountingModel, format_rate, short_paper
from left_trainer.cli.methods import FAMILIES, WORKS_WITH
from left_trainer.embedded import MODEL_PATHS
from left_trainer.methods.method import Feature, MethodFamily
from left_trainer.models import load_model
from tiny import tiny_model

RECORD_KEYS = {
    *("name", "aliases", "family", "summary", "paper", "learning_rate", "learning_rate_source", "equation"),
    *("when_to_use", "defaults", "preset", "required", "hook_options", "model_families", "unsupported", "requires"),
    *("mergeable", "has_own_optimizer", "has_own_initialization", "has_own_callback", "trainable_parameters"),
    *("trainable_percent", "config_class", "model"),
}


def records(capsys, *arguments: str) -> dict[str, dict]:
    assert main(["methods", "--json", *arguments]) == 0
    return {record["name"]: record for record in json.loads(capsys.readouterr().out)}


def shown(capsys, *arguments: str) -> str:
    assert main(["methods", *arguments]) == 0
    return capsys.readouterr().out


def fails(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(["methods", *arguments])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_names_in_the_help_are_those_of_the_registry():
    assert set(FAMILIES) == set(get_args(MethodFamily))
    assert set(WORKS_WITH) - {"merge", "lora"} <= set(get_args(Feature))


def test_json_has_every_method_with_its_count(capsys):
    found = records(capsys)
    assert set(found) == {method.name for method in list_methods()}
    for name, record in found.items():
        assert set(record) >= RECORD_KEYS
        if record["trainable_parameters"] is None:
            assert record["required"] or record["requires"], name
            assert record["trainable_note"].startswith("needs ")
        else:
            assert record["trainable_parameters"] > 0
    assert found["cpt"]["model"] == "embedded/llama"
    assert (found["lora_plus"]["has_own_optimizer"], found["lora"]["has_own_optimizer"]) == (True, False)
    assert found["lora"]["config_class"] == "LoraConfig"
    assert found["full"]["trainable_percent"] == 100


@pytest.mark.parametrize("name", ["lora", "prefix_tuning", "bitfit", "unilora", "shira", "ln_tuning"])
def test_counts_are_those_of_the_loaded_model(name, capsys):
    model = apply_method(load_model(str(MODEL_PATHS["encoder_decoder"])), name)
    assert records(capsys, name)[name]["trainable_parameters"] == count_parameters(model).trainable


@pytest.mark.parametrize("columns", ["80", "120", "200"])
def test_table_fits_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    lines = shown(capsys, "--family", "soft_prompt").splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert any("needs cpt_token_ids" in line for line in lines)
    assert any("virtual token embeddings" in line for line in lines) == (columns == "200")
    assert any("Lester et al., 2021" in line for line in lines) == (columns != "80")


def test_filters(capsys):
    assert {record["family"] for record in records(capsys, "--family", "additive").values()} == {"additive"}
    found = records(capsys, "--works_with", "decoder_only", "packing", "merge", "--family", "selective")
    assert found
    assert all(record["mergeable"] and "packing" not in record["unsupported"] for record in found.values())


def test_exports_are_shown_and_filtered(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    table = shown(capsys, "--family", "selective", "--works_with", "packing", "shrinking", "encoder_decoder", "merge")
    assert "exports" in table
    assert "not lora" in next(line for line in table.splitlines() if line.strip().startswith("bitfit"))
    assert "ctranslate2, gguf, onnx" in shown(capsys, "full")
    found = records(capsys, "--works_with", "lora", "--family", "reparameterization")
    assert {found[name]["plain_lora"] for name in ("lora", "adalora", "qlora")} == {"exact"}
    assert found["vera"]["plain_lora"] == "approximate"
    assert not {"dora", "oft", "boft"} & set(found)
    assert (found["qlora"]["exports"], found["lora"]["exports"][-1]) == (["lora"], "lora")
    assert all(record["sharded"] == ("sharded" not in record["unsupported"]) for record in found.values())
    assert "without loss" in shown(capsys, "lora")


def test_a_model_of_the_users(capsys, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    table = shown(capsys, "--model", str(tmp_path), "--family", "additive")
    assert "ia3" in table.split("trained:")[0]
    assert "beft" not in table.split("trained:")[0]
    assert table.count("beft") == 1
    assert "Conv1D" in fails(capsys, "beft", "--model", str(tmp_path))
    found = records(capsys, "lora", "--model", str(tmp_path))["lora"]
    expected = count_parameters(apply_method(tiny_model("gpt2"), "lora")).trainable
    assert (found["trainable_parameters"], found["model"]) == (expected, str(tmp_path))


def test_what_cannot_be_counted_says_what_it_takes(monkeypatch):
    monkeypatch.setattr("left_trainer.cli.method_records.LARGEST_BUILT", 0)
    model = CountingModel("embedded/t5")
    assert model.skeleton.num_parameters() < LARGEST_BUILT
    assert model.count(get_method("unilora")).note == "needs the weights"
    absent = replace(get_method("lora"), requires={"no_such_module": "no-such-package"})
    assert model.count(absent).note == "needs no-such-package"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert model.count(get_method("qlora")).count > 0


@pytest.mark.parametrize("name", ["lora", "cpt", "corda", "trainable_tokens", "dora", "full", "houlsby"])
def test_one_method_in_full(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    method, text = get_method(name), shown(capsys, name)
    facts = (method.summary, method.paper, method.equation, method.when_to_use, method.learning_rate_source)
    options = {**method.defaults, **method.preset, **method.hook_options}
    for fact in (*facts, *options, *method.required, *method.unsupported.values(), *method.aliases):
        assert fact in text
    assert f"--peft_method {method.name}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lorra"], "Did you mean 'lora'"),
        (["--family", "soft_promt"], "Did you mean 'soft_prompt'"),
        (["--works_with", "paking"], "Did you mean 'packing'"),
        (["--model", "no/where"], "neither a directory"),
        (["--model", "embedded/t5", "cpt"], "does not work on T5ForConditionalGeneration"),
        (["lora", "--family", "selective"], "'lora' does not match"),
        (["--family", "soft_prompt", "--works_with", "merge"], "No method matches"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert message in fails(capsys, *arguments)


def test_short_forms():
    assert short_paper("Hu et al., 2021, arXiv 2106.09685") == "Hu et al., 2021"
    assert short_paper("2026, arXiv 2607.09287") == "2026, arXiv 2607.09287"
    assert [format_rate(rate) for rate in (2e-4, 0.3, 2.5e-4)] == ["2e-4", "3e-1", "2.5e-4"]
