"""Adapters in lm-evaluation-harness, on tasks whose data are local."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from datasets import Dataset

from left_trainer import LeftTrainer
from left_trainer.cli.main import main
from left_trainer.models import FAMILIES
from left_trainer.runs.inference import Generator
from left_trainer.runs.lm_evaluation import LmEvaluation, evaluate_with_lm_eval

is_installed = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not is_installed, reason="lm-eval is not installed")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
doc_to_text: "Say {{{{word}}}}:"
target_delimiter: ""
{form}
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: ["{space}green", "{space}red"]
doc_to_target: 1
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITTEN = """
output_type: generate_until
doc_to_target: "{space}red"
generation_kwargs: {{do_sample: false, max_gen_toks: 8, until: ["</s>"]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
WORDS = ("a", "bb", "c d", "e", "f g h", "i")


def write_tasks(folder: Path, family: str) -> list[str]:
    """Two tasks: to choose a word and to write it. An encoder-decoder's target begins with no space."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"word": word}) + "\n" for word in WORDS))
    space = "" if family == "encoder_decoder" else " "
    for name, form in (("choice", CHOICE), ("written", WRITTEN)):
        text = TASK.format(name=name, rows=rows, form=form.format(space=space))
        (folder / f"{name}.yaml").write_text(text)
    return [str(folder / "written.yaml"), str(folder / "choice.yaml")]


@needs_lm_eval
@pytest.mark.parametrize("method", ["lora", "p_tuning", "prefix_tuning"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_scored_and_not_its_base(family, method, saved_models, make_args, tmp_path, capsys):
    tasks = write_tasks(tmp_path, family)
    rows = Dataset.from_list([{"prompt": f"Say {word}:", "completion": " red"} for word in WORDS])
    steps, rate = {"lora": (60, 0.1), "prefix_tuning": (60, 0.1), "p_tuning": (60, 0.05)}[method]
    args = make_args(peft_method=method, max_steps=steps, learning_rate=rate, logging_steps=100)
    trainer = LeftTrainer(str(saved_models[family]), args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    base = evaluate_with_lm_eval(LmEvaluation(path=str(saved_models[family]), tasks=tasks)).metrics
    folder = tmp_path / "scores"
    words = ["--adapter", str(tmp_path / "run"), "--lm_eval", *tasks, "--output_dir", str(folder)]
    assert main(["evaluate", *words]) == 0
    report = json.loads((folder / "evaluation_report.json").read_text())
    assert report["method"] == method
    assert report["test_rows"] == 12
    prompts = [f"Say {word}:" for word in WORDS]
    answers = Generator(str(tmp_path / "run"), num_beams=1, max_new_tokens=8)(prompts)
    samples = [(sample["source"], sample["prediction"].strip()) for sample in report["samples"]]
    assert samples == list(zip(prompts, answers, strict=True))[:3]
    if method != "p_tuning":  # with which a model this small does not learn all of them
        assert report["metrics"]["written.exact_match"] == report["metrics"]["choice.acc"] == 1
        assert base["written.exact_match"] == 0
    assert "choice.acc" in capsys.readouterr().out


@needs_lm_eval
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("hellaswagg", "no task of lm-evaluation-harness. Did you mean 'hellaswag'"),
        ("no.yaml", "'no.yaml' does not exist"),
    ],
)
def test_a_task_that_is_not_known_is_refused_before_weights_are_loaded(task, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("left_trainer.runs.lm_evaluation.load_for_use", None)
    with pytest.raises(SystemExit):
        main(["evaluate", "--model_name_or_path", "embedded", "--lm_eval", task])
    assert message in capsys.readouterr().err


def test_without_the_package_the_line_to_install_it_is_said(capsys, monkeypatch):
    monkeypatch.setattr("left_trainer.runs.lm_evaluation.PACKAGE", "no_such_package")
    with pytest.raises(SystemExit):
        main(["evaluate", "--model_name_or_path", "embedded", "--lm_eval", "hellaswag"])
    said = capsys.readouterr().err
    assert said.endswith("Install it: pip install lm-eval\n")
    assert said.count("\n") == 1


def test_what_the_tasks_decide_is_refused(capsys):
    for words, message in (
        (["--lm_eval", "hellaswag", "--prompt", "{source}"], "argument --prompt: not allowed with --lm_eval"),
        ([], "--test_file --lm_eval"),
    ):
        with pytest.raises(SystemExit):
            main(["evaluate", "--model_name_or_path", "x", *words])
        assert message in capsys.readouterr().err
