"""`left-trainer compare`: the grid it lays out, what it refuses, and what its processes leave, killed or not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compared import finished, quality
from left_trainer import LeftTrainer, get_method, list_methods
from left_trainer.cli.main import main
from left_trainer.comparison import cell as cell_module
from left_trainer.comparison.cell import Cell
from left_trainer.comparison.flags import flags_of, parse_flags
from left_trainer.comparison.general_text import MAX_WORDS, N_PASSAGES, general_loss, general_rows
from left_trainer.comparison.grid import DEFAULT_METHODS, DEFAULT_TASKS, GridOptions, Plan, make_grid
from left_trainer.comparison.results import read_results
from left_trainer.comparison.tuned import edge_of, widen
from processes import ENVIRONMENT, kill
from tiny import tiny_model, tiny_rows, tiny_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """A train and a test file with the columns of summarization."""
    folder = tmp_path_factory.mktemp("data")
    files = {}
    for split, size in (("train", 24), ("test", 6)):
        rows = [{"document": row["prompt"], "summary": row["completion"].strip()} for row in tiny_rows(size, size)]
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[f"{split}_file"] = str(file)
    return files


def small(saved_models, data) -> dict[str, object]:
    """Arguments of runs of a second."""
    return {
        "model_name_or_path": str(saved_models["encoder_decoder"]),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "generation_max_length": 6,
        **data,
    }


def compare(python: str, output_dir: Path, *flags: str) -> list[str]:
    return [python, "-m", "left_trainer.cli.main", "compare", "--output_dir", str(output_dir), *flags]


def test_the_default_grid(tmp_path):
    grid = make_grid(GridOptions(), tmp_path)
    assert [cell.task for cell in grid.bases] == list(DEFAULT_TASKS)
    assert len(grid.plans) == len(DEFAULT_TASKS) * len(DEFAULT_METHODS)
    assert len({cell.name for cell in grid.cells}) == len(grid.cells)
    assert {cell.conditions["base_model"] for cell in grid.cells} == {"embedded/t5"}
    assert make_grid(GridOptions(), tmp_path / "elsewhere") == grid


def test_seeds_and_trials(tmp_path):
    options = GridOptions(
        methods=["lora"], tasks=["summarization"], seeds=3, tune="learning_rate", tune_factors=(0.5, 2)
    )
    (plan,) = make_grid(options, tmp_path).plans
    assert [cell.seed for cell in plan.runs] == [42, 43, 44]
    rate = get_method("lora").narrow_learning_rate
    assert [cell.arguments["learning_rate"] for cell in plan.trials] == pytest.approx([rate / 2, rate * 2])
    assert {cell.kind for cell in plan.trials} == {"trial"}


def tuned_plan(tmp_path: Path, scores: dict[float, float | None], **options: Any) -> Plan:
    """A plan after its trials: each new rate scores what `scores` gives for its multiple of the default."""
    options = {"tune": "learning_rate", "tune_factors": (0.5, 1, 2), **options}
    (plan,) = make_grid(GridOptions(methods=["lora"], tasks=["summarization"], **options), tmp_path).plans
    default = plan.trials[0].arguments["learning_rate"] / options["tune_factors"][0]
    reports: dict[float, Any] = {}
    for _ in range(5):
        for cell in plan.trials:
            rate = cell.arguments["learning_rate"]
            after = {"rougeL": scores[round(rate / default, 3)], "loss": 1.0}
            reports[rate] = SimpleNamespace(metrics=SimpleNamespace(after=after))
        plan = widen(plan, reports)
    return plan


@pytest.mark.parametrize(
    ("scores", "n_trials", "edge"),
    [
        ({0.5: 1, 1: 2, 2: 1}, 3, None),
        ({0.5: 1, 1: 2, 2: 3, 4: 2}, 4, None),
        ({0.5: 1, 1: 2, 2: 3, 4: 4, 8: 3}, 5, None),
        ({0.5: 1, 1: 2, 2: 3, 4: 4, 8: 5}, 5, "highest"),
        ({0.5: 3, 1: 2, 2: 1, 0.25: 4, 0.125: 5}, 5, "lowest"),
        ({0.5: 1, 1: 2, 2: 3, 4: None}, 4, None),
        ({0.5: None, 1: None, 2: None}, 3, None),
    ],
)
def test_rates_are_added_beyond_the_edge_where_the_best_is(scores, n_trials, edge, tmp_path):
    plan = tuned_plan(tmp_path, scores)
    assert len(plan.trials) == n_trials
    assert plan.n_widenings == n_trials - 3
    assert len({cell.name for cell in plan.trials}) == n_trials
    known = {factor: score for factor, score in scores.items() if score is not None}
    if known:
        default = plan.trials[1].arguments["learning_rate"]
        assert edge_of(float(f"{max(known, key=known.get) * default:.3g}"), plan) == edge


def test_one_rate_has_no_edge(tmp_path):
    assert len(tuned_plan(tmp_path, {1: 1}, tune_factors=(1,)).trials) == 1


def test_options_of_one_method_and_one_task(tmp_path, data):
    options = GridOptions(
        methods=["ia3", {"peft_method": "lora", "peft_kwargs": {"r": 32}, "learning_rate": "1e-3"}],
        tasks=["dialogue", {"task": "summarization", **data}],
    )
    cells = {(cell.task, cell.method): cell for plan in make_grid(options, tmp_path).plans for cell in plan.runs}
    lora = cells["summarization", "lora"]
    assert lora.arguments["learning_rate"] == 1e-3
    assert lora.parse(tmp_path)[2].peft_kwargs["r"] == 32
    assert lora.arguments["train_file"] == data["train_file"]
    assert "train_file" not in cells["dialogue", "lora"].arguments
    assert "learning_rate" not in cells["dialogue", "ia3"].arguments


def test_all_methods_are_those_that_work(tmp_path):
    grid = make_grid(GridOptions(methods=["all"], tasks=["summarization"]), tmp_path)
    taken = {plan.runs[0].method for plan in grid.plans}
    assert taken | set(grid.left_out) == {method.name for method in list_methods()}
    assert {"lora", "houlsby_adapter", "full"} <= taken
    assert all(grid.left_out.values())
    assert grid.left_out["xlora"] == "needs adapters"


def test_what_identifies_a_cell(tmp_path, data):
    def name(**arguments: object) -> str:
        options = GridOptions(methods=["lora"], tasks=["summarization"], arguments={**data, **arguments})
        return make_grid(options, tmp_path).plans[0].runs[0].name

    before = name()
    assert name(num_train_epochs=2) != before
    assert name() == before
    file = Path(data["train_file"])
    text = file.read_text()
    file.write_text(text.replace("red", "mauve"))
    assert name() != before
    file.write_text(text)


def test_flags_are_only_those_given():
    assert parse_flags(["--max_steps", "5", "--bf16"]) == {"max_steps": 5, "bf16": True}
    given = {"learning_rate": "1e-3", "bf16": True, "peft_kwargs": {"r": 4}, "label_names": ["a", "b"], "prompt": None}
    parsed = parse_flags(flags_of(given))
    assert parsed["learning_rate"] == 1e-3
    assert parsed["label_names"] == ["a", "b"]
    assert "prompt" not in parsed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "lorra"], "Did you mean 'lora'?"),
        (["--tasks", "sumarization"], "Did you mean 'summarization'?"),
        (["--methods", ","], "methods is empty"),
        (["--seeds", "0"], "seeds=0 must be an integer, at least 1"),
        (["--tune", "rank"], "tune='rank' is not supported. Allowed: learning_rate"),
        (["--tune", "learning_rate", "--tune_factors", "-1"], "tune_factors=[-1.0]"),
        (["--jobs", "-1"], "jobs=-1 must be an integer, at least 1"),
        (["--jobs", "0"], "jobs=0 must be an integer, at least 1"),
        (["--peft_method", "lora"], "Use --methods"),
        (["--seed", "3"], "Use --seeds"),
        (["--train_file", "x.jsonl"], "Compare one task, --tasks summarization"),
        (["--tasks", "summarization", "--train_file", "missing.jsonl"], "does not exist"),
        (["--general_text_file", "missing.txt"], "general_text_file='missing.txt' does not exist"),
        (["--methods", "lora,lora"], "is listed twice in methods"),
        (["--tasks", "dialogue", "dialogue"], "dialogue is listed twice in tasks"),
        (["--methods", "adaption_prompt"], "does not work with peft_method='adaption_prompt'"),
        (["--num_train_epochz", "3"], "--num_train_epochz"),
        (["--config", "missing.yaml"], "config='missing.yaml' does not exist"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(flags, message, tmp_path, capsys, no_weights):
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", "--output_dir", str(tmp_path / "out"), *flags])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- lora", "must contain a mapping"),
        ("methods: [{r: 8}]", "has no peft_method"),
        ("methods: [{peft_method: lora, peft_kwargs: {rank: 8}}]", "rank"),
        ("tasks: [summarization\n", "is not valid YAML"),
        ("learning_rte: 1e-3", "learning_rte"),
        ("seeds: two", "seeds='two' must be an integer, at least 1"),
        ("jobs: two", "jobs='two', which must be an integer"),
        ("{tune: learning_rate, tune_factors: 3}", "tune_factors=3, which must be a list"),
    ],
)
def test_bad_yaml_is_refused(content, message, tmp_path, capsys, no_weights):
    (tmp_path / "grid.yaml").write_text(content)
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", "--config", str(tmp_path / "grid.yaml"), "--output_dir", str(tmp_path / "out")])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_general_text(tmp_path):
    assert len(general_rows(None)) == N_PASSAGES
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"paragraph {number} " + "word " * 200 for number in range(300)) + "\n\nshort")
    rows = general_rows(str(file))
    assert len(rows) == N_PASSAGES
    assert rows[-1]["prompt"].startswith("paragraph 297 ")
    assert len(f"{rows[0]['prompt']}{rows[0]['completion']}".split()) == MAX_WORDS
    file.write_text("too short")
    with pytest.raises(ValueError, match="no paragraph of at least 8 words"):
        general_rows(str(file))


@pytest.mark.parametrize(
    ("name", "content", "n_rows", "start"),
    [
        ("lines.txt", "\n".join(f"line {number} of a file" for number in range(60)), 3, "line 0 of"),
        ("blank.txt", "\n\n".join(f"short line {number}" for number in range(9)) + "\n\n\n", 3, "short line 0 short"),
        ("unspaced.txt", "我们在城里走了一整天" * 30 + "\n\n" + "没有空格" * 4, 4, "我们在城里"),
        ("rows.jsonl", "".join(json.dumps({"text": f"{n} " + "word " * 9}) + "\n\n" for n in range(4)), 4, "0 word"),
        ("long_first.txt", "word " * 130 + "\n\n" + "a b c d\n\ne f g h", 3, "word word"),
    ],
)
def test_general_text_may_have_any_lines(name, content, n_rows, start, tmp_path):
    file = tmp_path / name
    file.write_text(content)
    rows = general_rows(str(file))
    assert len(rows) == n_rows
    assert rows[0]["prompt"].startswith(start)
    for row in rows:
        assert row["prompt"].strip()
        assert row["completion"].strip()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"body": "x"}', "Line 1 of general_text_file=.* is no JSON object with the field 'text'"),
        ("rows.jsonl", b"plain words", "is no JSON object"),
        ("image.png", b"\x89PNG\xff\xfe", "is not UTF-8 text"),
        ("empty.txt", b"\n\n", "has no paragraph of at least 8 words, nor several"),
    ],
)
def test_general_text_that_cannot_be_read(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        general_rows(str(tmp_path / name))


def arabic_tokenizer(unknown: str | None) -> PreTrainedTokenizerFast:
    """Of Arabic letters alone; others become `unknown`, or nothing."""
    vocabulary = {
        token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *"ابتثجحخدذرزسشصضطظعغفقكلمنهوي"])
    }
    model = models.WordLevel(vocabulary, unk_token="<unk>") if unknown else models.BPE(vocabulary, [])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", **({"unk_token": unknown} if unknown else {})
    )


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_a_tokenizer_without_english_letters_is_found_out_before_anything_runs(unknown, saved_models, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(saved_models["encoder_decoder"], model)
    arabic_tokenizer(unknown).save_pretrained(model)
    options = GridOptions(methods=["lora"], tasks=["summarization"], arguments={"model_name_or_path": str(model)})
    assert "the tokenizer lacks the letters of generated English text" in make_grid(options, tmp_path).no_general_loss
    text = tmp_path / "text.txt"
    text.write_text("English words that nobody can read here at all")
    with pytest.raises(ValueError, match=f"general_text_file='{text}' cannot be used"):
        make_grid(replace(options, general_text_file=str(text)), tmp_path)
    text.write_text("ولد ناقل الايدز الليبي في بنغازي في عام")
    assert make_grid(replace(options, general_text_file=str(text)), tmp_path).no_general_loss is None


def test_a_run_without_general_loss_says_why(monkeypatch):
    """A cell is not lost for what it measures on the side."""
    monkeypatch.setattr(cell_module, "general_loss", lambda trainer, rows: 1 / 0)
    trainer = SimpleNamespace(processing_class=tiny_tokenizer("encoder_decoder"))
    monkeypatch.setattr(cell_module, "readable_rows", lambda rows, tokenizer: rows)
    assert cell_module.forgetting(trainer, None) == {"general_loss_reason": "ZeroDivisionError: division by zero"}
    monkeypatch.setattr(cell_module, "readable_rows", lambda rows, tokenizer: rows.select([]))
    monkeypatch.setattr(cell_module, "why_unreadable", lambda file, tokenizer: "no letters")
    assert cell_module.forgetting(trainer, None) == {"general_loss_reason": "no letters"}


@pytest.mark.parametrize("model_type", ["bart", "gpt2"])
def test_general_text_fits_models_with_few_positions(model_type, rows, make_args, tokenizers):
    """A prefix takes positions too, and a passage of the generated text has more tokens than these models positions."""
    model = tiny_model(model_type)
    family = "encoder_decoder" if model.config.is_encoder_decoder else "decoder_only"
    args = make_args(peft_method="prefix_tuning", peft_kwargs={"num_virtual_tokens": 20})
    trainer = LeftTrainer(model, args, train_dataset=rows, processing_class=tokenizers[family])
    assert 0 < general_loss(trainer, general_rows(None)) < 20


@pytest.fixture(scope="module")
def undisturbed(saved_models, data, python, tmp_path_factory):
    """A finished comparison from a YAML file: two seeds, tuning, a run that fails, a general text."""
    folder = tmp_path_factory.mktemp("undisturbed")
    text = folder / "general.txt"
    text.write_text("\n\n".join(row["prompt"] * 3 for row in tiny_rows(8, 3)))
    config = folder / "grid.yaml"
    content = {
        **small(saved_models, data),
        "methods": ["lora", {"peft_method": "prefix_tuning", "max_length": 4}],
        "tasks": ["summarization"],
        "seeds": 2,
        "general_text_file": str(text),
    }
    config.write_text(json.dumps(content))  # JSON is YAML
    command = compare(python, folder / "out", "--config", str(config))
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    return folder / "out", config, result


@pytest.mark.timeout(600)
def test_a_comparison_from_end_to_end(undisturbed):
    folder, _, process = undisturbed
    assert process.returncode == 1, process.stderr[-2000:]
    assert "prefix_tuning on summarization, seed 42: ValueError: Prompt and target take" in process.stdout
    assert "summarization, lora, seed 42: started, log " in process.stderr
    assert "\r" not in process.stderr
    for word in ("Test loss after", "Memory, training", "Steps/s"):
        assert word in process.stdout
    results = read_results(folder)
    assert len(results) == 5
    by_kind = {(result.cell.method, result.cell.kind): result for result in results}
    base, lora = by_kind["full", "base"].report, by_kind["lora", "method"].report
    assert base.metrics.after is None
    assert lora.metrics.before is None
    assert lora.general_loss != base.general_loss
    assert len(lora.loss_history) == 3
    for peak in (lora.peak_memory_bytes.train, lora.peak_memory_bytes.eval, base.peak_memory_bytes.eval):
        assert peak > lora.memory_before_model_bytes * 0.5
    (predictions,) = folder.glob("cells/*-lora-seed42-*/predictions.jsonl")
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    references = [row["completion"].strip() for row in tiny_rows(6, 6)]
    assert [(row["row"], row["reference"]) for row in rows] == list(enumerate(references))
    assert [row["prediction"] for row in rows[:6]] == [sample.prediction for sample in lora.samples]
    assert f"cells/{predictions.parent.name}/predictions.jsonl" in (folder / "index.html").read_text()
    assert (lora.test_rows, base.test_rows) == (6, 6)
    assert lora.score_interval.low <= lora.metrics.after["rougeL"] <= lora.score_interval.high
    assert lora.run_seconds > 0
    assert not list(folder.glob("cells/*/progress.txt"))
    lines = quality(folder)
    assert [line["method"] for line in lines] == ["base", "lora", "prefix_tuning", "prefix_tuning"]
    assert lines[1]["seeds"] == "42 43"
    assert lines[1]["learning_rate_source"] == "default"
    assert not list(folder.glob("cells/*/*.safetensors"))
    for name in ("index.html", "table.md", "table.tex", "quality_memory.png"):
        assert (folder / name).stat().st_size > 100


# How many of the five runs are finished, and a file that is there.
MOMENTS = {
    "nothing was run": (0, ".left_trainer.lock"),
    "the first run has begun": (0, "cells/*/cell.json"),
    "the first run is finished": (1, "cells"),
    "an adapter is being saved": (1, "cells/*/adapter_config.json"),
    "two runs are finished": (2, "cells"),
}


@pytest.mark.timeout(600)
def test_killed_at_five_moments_it_gives_the_same_table(undisturbed, python, tmp_path):
    folder, config, _ = undisturbed
    command = compare(python, tmp_path / "out", "--config", str(config))
    for n_finished, file in MOMENTS.values():
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            while len(finished(tmp_path / "out")) < n_finished or not list((tmp_path / "out").glob(file)):
                assert process.poll() is None
                time.sleep(0.01)
            kill(process)
        assert process.returncode == -signal.SIGKILL
    kept = finished(tmp_path / "out")
    last = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert last.returncode == 1, last.stderr[-2000:]
    assert quality(tmp_path / "out") == quality(folder)
    assert len(kept) >= 2
    now = finished(tmp_path / "out")
    assert all(now[name] == report for name, report in kept.items())


def test_a_cell_ends_with_the_process_that_started_it(saved_models, data, python, tmp_path):
    arguments = {**small(saved_models, data), "max_steps": 100000, "peft_method": "lora"}
    Cell("method", "summarization", arguments, {}).write(tmp_path)
    command = [python, "-m", "left_trainer.comparison.cell", str(tmp_path), "--exit_with_parent"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    child.stdin.close()  # what the system does when the parent is gone
    assert child.wait() == 1
    assert {file.name for file in tmp_path.iterdir()} == {"cell.json"}


@pytest.mark.timeout(600)
def test_trials_choose_the_rate_and_earlier_runs_are_kept(saved_models, data, python, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "executable", python)  # of the runs
    content = {**small(saved_models, data), "methods": "lora", "tasks": "summarization"}
    config = tmp_path / "grid.yaml"
    config.write_text(json.dumps(content))
    flags = ["--tune", "learning_rate", "--tune_factors", "1", "3", "--jobs", "2", "--save_adapters"]
    assert main(["compare", "--output_dir", str(tmp_path / "out"), "--config", str(config), *flags]) == 0
    results = read_results(tmp_path / "out")
    trials = {r.report.learning_rate: r.report.metrics.after for r in results if r.cell.kind == "trial"}
    (run,) = [result for result in results if result.cell.kind == "method"]
    best = max(trials, key=lambda rate: (trials[rate]["rougeL"], -trials[rate]["loss"]))
    assert run.report.learning_rate == best
    assert run.report.learning_rate_source == "tuned"
    tuning = run.report.tuning
    assert run.cell.tuning == tuning
    # The loss of a model that has learned next to nothing falls with every higher rate.
    assert (tuning.metric, tuning.n_trials, tuning.train_steps) == ("rougeL", 4, 12)
    assert (tuning.n_widenings, tuning.edge) == (2, "highest")
    assert {trial.learning_rate: trial.score for trial in tuning.trials} == {
        rate: scores["rougeL"] for rate, scores in trials.items()
    }
    assert all(trial.train_steps == 3 and trial.train_seconds > 0 for trial in tuning.trials)
    (adapter,) = (tmp_path / "out" / "cells").glob("*/adapter_model.safetensors")
    assert "trial" not in adapter.parent.name
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("tuned: best of 4 by rougeL on the validation split") == 1
    assert "12 steps" in table
    assert "the best is the highest of them" in table

    before = (tmp_path / "out" / "results.jsonl").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["compare", "--output_dir", str(tmp_path / "out"), "--config", str(config), "--prompt", "Say: {source}"])
    assert "different prompts" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.jsonl").read_text() == before
