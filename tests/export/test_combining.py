"""`left-trainer merge --adapters`: PEFT's combinations, saved as one adapter and scored with each."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from exports import make_base, make_run, write_rows
from left_trainer.cli.main import main
from left_trainer.export.combining import COMBINATIONS, Combination, combine_adapters
from left_trainer.methods.saving import load_trained
from left_trainer.models import FAMILIES, auto_class
from left_trainer.runs.inference import Generator
from left_trainer.runs.merging import probe
from tiny import FAMILY_TYPES

pytestmark = pytest.mark.filterwarnings("ignore:Model (has|with) (the )?`tie_word_embeddings=True`")


@pytest.fixture(scope="module", params=FAMILIES)
def adapters(request, tmp_path_factory):
    """Two adapters of one base, of one rank."""
    place = tmp_path_factory.mktemp("adapters")
    base = make_base(place / "base", FAMILY_TYPES[request.param], max_position_embeddings=512)
    first = make_run(place / "first", base, options={"r": 4}, size=0.3)
    second = make_run(place / "second", base, "rslora", {"r": 4}, size=0.1)
    return request.param, base, (str(first), str(second))


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_a_combination_is_one_adapter(combine, adapters, tmp_path):
    """What PEFT computes in memory is what the folder holds."""
    family, base, paths = adapters
    combine_adapters(Combination(paths, combine, (0.7, 0.3)), tmp_path / "out")
    expected = auto_class(family).from_pretrained(base)
    expected = PeftModel.from_pretrained(expected, paths[0], adapter_name="a")
    expected.load_adapter(paths[1], "b")
    torch.manual_seed(0)
    options = {"density": 0.5} if COMBINATIONS[combine] else {}
    expected.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type=combine, **options)
    expected.set_adapter("both")
    found = PeftModel.from_pretrained(auto_class(family).from_pretrained(base), tmp_path / "out")
    assert torch.allclose(probe(found, family), probe(expected, family), atol=1e-4)
    assert list(found.peft_config) == ["default"]
    assert json.loads((tmp_path / "out" / "combination.json").read_text())["combine"] == combine
    assert len(Generator(str(tmp_path / "out"), max_new_tokens=4)(["Repeat 3 now:"])) == 1


def test_cat_adds_the_changes_of_the_weights(adapters, tmp_path):
    """`linear` adds the factors, whose product has terms of both."""
    family, _, paths = adapters
    combine_adapters(Combination(paths, "cat", (1.0, 0.0)), tmp_path / "out")
    first, both = load_trained(paths[0], is_trainable=False), load_trained(str(tmp_path / "out"), is_trainable=False)
    assert torch.allclose(probe(first, family), probe(both, family), atol=1e-4)


def test_each_and_the_combination_are_scored(adapters, tmp_path, capsys):
    _, _, paths = adapters
    rows = write_rows(tmp_path, 3)
    arguments = ["--combine", "ties", "--output_dir", str(tmp_path / "out"), "--task", "summarization"]
    assert main(["merge", "--adapters", *paths, *arguments, "--test_file", str(rows)]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if "rouge1" in line)
    assert "loss" in header
    assert all(any(line.strip().startswith(path) for line in lines) for path in (*paths, str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"combine": "tie"}, "--combine 'tie' is not known"),
        ({"weights": (1.0,)}, "1 numbers for 2 adapters"),
        ({"combine": "cat", "density": 0.5}, "--density has no effect"),
        ({"density": 1.5}, "above 0 and at most 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        Combination(**{"adapters": ("a", "b"), "combine": "ties", **options})


def test_adapters_that_do_not_fit_each_other_are_refused(tmp_path):
    base, other = make_base(tmp_path / "base", "llama"), make_base(tmp_path / "other", "llama")
    first = str(make_run(tmp_path / "first", base))
    cases = {
        "one base model": (make_run(tmp_path / "elsewhere", other), "linear"),
        "is no plain LoRA": (make_run(tmp_path / "ia3", base, "ia3"), "linear"),
        "--combine cat": (make_run(tmp_path / "wide", base, options={"r": 3}), "linear"),
        "base model of its own": (make_run(tmp_path / "changed", base, changed=True), "linear"),
        "holds no adapter": (base, "cat"),
    }
    for reason, (path, combine) in cases.items():
        with pytest.raises(ValueError, match=reason):
            combine_adapters(Combination((first, str(path)), combine), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_one_and_several_are_not_mixed(tmp_path, capsys):
    for arguments, reason in (
        (["--adapters", str(tmp_path), str(tmp_path)], "--adapters needs --combine"),
        (["--adapter", str(tmp_path), "--combine", "ties"], "is for --adapters"),
        (["--adapters", "nowhere", "--combine", "ties"], "does not exist"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(["merge", *arguments, "--output_dir", str(tmp_path / "out")])
        assert exit_info.value.code == 2
        assert reason in capsys.readouterr().err
