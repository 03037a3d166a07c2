"""Settings of a comparison: how a user writes them, which cells they give, and in which order these run."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import yaml

from left_trainer.cli.main import main
from left_trainer.comparison import worker as worker_module
from left_trainer.comparison.attempt import Attempt
from left_trainer.comparison.cell import FAILURE_FILE, Cell, run_cell
from left_trainer.comparison.grid import Grid, GridOptions, make_grid
from left_trainer.comparison.plan_file import PlanFile
from left_trainer.comparison.results import CELLS, Result, check_comparable, read_cells
from left_trainer.comparison.sets import LOSSES, SETS, SIZES, set_options, smaller
from left_trainer.comparison.settings import Setting, read_setting, split_settings
from left_trainer.comparison.worker import Terms, Worker, prepare
from left_trainer.runs.json_records import write_json
from left_trainer.runs.report import REPORT_FILE
from processes import ENVIRONMENT, kill
from tiny import tiny_model, tiny_rows

STUDENT = {"peft_method": "full", "teacher_model": "{teacher}", "distillation_kwargs": "alpha=0.5"}
TEACHER_AND_STUDENT = [{"name": "teacher", "peft_method": "full"}, {"name": "student", **STUDENT}]
GOLDEN = ["summarization-lora-seed42-37e4cbab", "summarization-lora-seed42-219faaa9"]
ODD_NAMES = ["a/b\\c", "..", "学生 λ=0.5", "<b>x</b> & |$_%|`y`", "nul", "-rf", "{x}", "x" * 80]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """A train and a test file with the columns of summarization."""
    folder = tmp_path_factory.mktemp("data")
    files = {}
    for split, size in (("train", 12), ("test", 4)):
        rows = [{"document": row["prompt"], "summary": row["completion"].strip()} for row in tiny_rows(size, size)]
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[f"{split}_file"] = str(file)
    return files


@pytest.fixture
def small(saved_models, data) -> dict[str, Any]:
    """Arguments of runs of a second."""
    return {
        "model_name_or_path": str(saved_models["encoder_decoder"]),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "generation_max_length": 6,
        **data,
    }


def grid_of(methods: list[Any], output_dir: Path, arguments: dict[str, Any] | None = None, **options: Any) -> Grid:
    options = {"tasks": ["summarization"], "arguments": arguments or {}, **options}
    return make_grid(GridOptions(methods=methods, **options), output_dir)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full", [Setting("full")]),
        ("lora , full,", [Setting("lora"), Setting("full")]),
        ("lora+learning_rate=1e-3", [Setting("lora", {"learning_rate": 1e-3})]),
        ("hot=lora+learning_rate=1e+3,full", [Setting("lora", {"learning_rate": 1e3}, "hot"), Setting("full")]),
        ("a=full + max_steps = 3", [Setting("full", {"max_steps": 3}, "a")]),
        ("a=full+teacher_model={b}", [Setting("full", {"teacher_model": "{b}"}, "a")]),
        ("a=full+teacher_model=c+d/e=f", [Setting("full", {"teacher_model": "c+d/e=f"}, "a")]),
        ("a=full+teacher_model='c+d=e,f'", [Setting("full", {"teacher_model": "c+d=e,f"}, "a")]),
        ("a=full+shrink_to=params=0.5", [Setting("full", {"shrink_to": "params=0.5"}, "a")]),
        (
            'a=full+shrink_to="encoder_layers=2,decoder_layers=1",ia3',
            [Setting("full", {"shrink_to": "encoder_layers=2,decoder_layers=1"}, "a"), Setting("ia3")],
        ),
        (
            'a=full+distillation_kwargs={"alpha": 0.5, "layer_map": [[1, 2], [2, 3]]}',
            [Setting("full", {"distillation_kwargs": '{"alpha": 0.5, "layer_map": [[1, 2], [2, 3]]}'}, "a")],
        ),
        ('"a, b=c"="full"', [Setting("full", {}, "a, b=c")]),
        ("it's mine=full,lora", [Setting("full", {}, "it's mine"), Setting("lora")]),
        ("学生=full", [Setting("full", {}, "学生")]),
    ],
)
def test_a_text_says_what_a_mapping_says(text, expected):
    assert [read_setting(part) for part in split_settings(text)] == expected
    mappings = [{"peft_method": item.method, "name": item.name, **item.arguments} for item in expected]
    assert [read_setting(mapping) for mapping in mappings] == expected


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("a=full+teacher_modell=b", "'teacher_modell', which is no argument of `left-trainer train`. Did you mean 'te"),
        ("a=lorra", "Did you mean 'lora'?"),
        ("a=full+shrink_to=encoder_layers=2,decoder_layers=1", "a value that contains a comma needs quotes"),
        ("a=", "'a=' is not a setting"),
        ("=full", "name='' of a setting must be a text of one line"),
        ("full+alpha", "'full+alpha' is not a setting"),
        ("a=full+max_steps=1+max_steps=2", "has max_steps twice"),
        ("a=full+teacher_model='x", "a quote or a bracket that is not closed: ' is missing"),
        ("a=full+seed=3", "Use --seeds"),
        ("a=full+learning_rate=abc", "'abc' is not a number"),
        ("a=full+distillation_kwargs=alfa=1", "Did you mean 'alpha'?"),
        ("a=full,a=lora", "'a' is the name of several settings"),
        ("lora=full,lora", "'lora' is the name of several settings"),
        ("base=full", "name='base' is that of a row which every table has"),
        ("a=full+teacher_model={teecher},teacher=full", "which is no setting of this comparison. Did you mean 'teach"),
        ("a=full+teacher_model={a}", "in a circle: a -> a"),
        ("a=full+teacher_model={b},b=full+teacher_model={c},c=lora+model_name_or_path={b}", "in a circle: "),
        ("a=full+teacher_model={lora},lora+max_steps=1,lora+max_steps=2", "the method of several settings"),
        ("teacher=full,a=full+teacher_model=teacher", "Write teacher_model={teacher}"),
        ("a=full+teacher_model=nowhere/at-all-x", "nowhere/at-all-x"),
        ("a=full+teacher_model={t},t=full+model_name_or_path=embedded/llama", "of the same family"),
        ("full+weight_decay=0.1,full+weight_decay=0.2", "Give each a name"),
        ("a=full+max_train_samples=5,full", "different data"),
        ("full+model_name_or_path=embedded/llama,lora", "different models"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(methods, message, tmp_path, capsys, no_weights):
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", "--output_dir", str(tmp_path / "out"), "--tasks", "summarization", "--methods", methods])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [True, ["a"], "", " ", "a\nb", "a\x07", "a\u202eb", "x" * 81, "majority label"])
def test_names_that_cannot_be_shown_are_refused(name):
    with pytest.raises(ValueError, match="name="):
        read_setting({"name": name, "peft_method": "full"})


def test_cells_without_a_name_are_called_as_ever(tmp_path):
    """These are names of cells that earlier versions have run."""
    methods = ["lora", {"peft_method": "lora", "peft_kwargs": {"r": 32}, "learning_rate": "1e-3"}]
    (base,), plans = (
        (grid := grid_of(methods, tmp_path, {"num_train_epochs": 2.0}, tune="learning_rate")).bases,
        grid.plans,
    )
    assert base.name == "summarization-base-seed42-cfebea3c"
    assert plans[0].trials[0].name == "summarization-lora-trial-seed42-d0f363f2"
    assert [plan.runs[0].name for plan in plans] == GOLDEN
    written = Cell.from_json(json.loads(json.dumps({**vars(base), "tuning": None})))
    assert written == base


def test_what_a_name_changes(tmp_path):
    (plain,), (named,) = (
        grid_of([method], tmp_path).plans for method in ("full", {"name": "x y", "peft_method": "full"})
    )
    assert plain.runs[0].name.startswith("summarization-full-seed42-")
    assert named.runs[0].name.startswith("summarization-x_y-seed42-")
    assert named.runs[0].title == "summarization, x y, seed 42"
    assert named.runs[0].arguments == plain.runs[0].arguments
    assert named.runs[0].conditions == plain.runs[0].conditions


def test_odd_names_make_folders(tmp_path):
    cells = [
        plan.runs[0] for plan in grid_of([{"name": name, "peft_method": "full"} for name in ODD_NAMES], tmp_path).plans
    ]
    assert len({cell.name.lower() for cell in cells}) == len(cells)
    for cell in cells:
        assert Path(cell.name).name == cell.name
        assert cell.name.isascii()
        assert len(cell.name) < 100
        (tmp_path / cell.name).mkdir()
        cell.write(tmp_path / cell.name)
        assert Cell.read(tmp_path / cell.name) == cell


def test_each_model_has_its_untrained_row(tmp_path):
    methods = [
        {"name": "large", "peft_method": "full"},
        {"name": "small", "peft_method": "full", "model_name_or_path": "embedded/llama"},
        {"name": "small too", "peft_method": "lora", "model_name_or_path": "embedded/llama"},
        {"name": "after large", "peft_method": "lora", "model_name_or_path": "{large}"},
        "lora",
    ]
    grid = grid_of(methods, tmp_path)
    assert [cell.conditions["base_model"] for cell in grid.bases] == ["embedded/t5", "embedded/llama"]
    models = [plan.runs[0].conditions["base_model"] for plan in grid.plans]
    assert models == ["embedded/t5", "embedded/llama", "embedded/llama", "embedded/t5", "embedded/t5"]
    check_comparable(grid.cells)
    assert [plan.level for plan in grid.plans] == [0, 0, 0, 1, 0]
    only_own = grid_of(methods[1:2], tmp_path)
    assert [cell.conditions["base_model"] for cell in only_own.bases] == ["embedded/llama"]


def test_all_methods_may_have_the_same_teacher(tmp_path):
    methods = [{"name": "teacher", "peft_method": "full", "teacher_model": "none"}, "all"]
    grid = grid_of(methods, tmp_path, {"teacher_model": "{teacher}"})
    levels = {plan.runs[0].label: plan.level for plan in grid.plans}
    assert levels["teacher"] == 0
    assert {levels["lora"], levels["full"]} == {1}


def test_a_base_learns_from_nobody_and_keeps_its_size(tmp_path):
    shared = {"shrink_to": "params=0.5", "teacher_model": "self"}
    (base,) = grid_of(["full"], tmp_path, shared).bases
    assert not set(shared) & set(base.arguments)


class Recorder:
    """An engine that runs nothing, notes what would be run, and leaves a report; `failing` settings have none."""

    is_here, jobs, tick_seconds = True, 1, 0.0
    report: Any = None

    def __init__(self, output_dir: Path, failing: tuple[str, ...] = ()) -> None:
        self.output_dir, self.failing = output_dir, failing
        self.results: list[Result] = []
        self.order: list[str] = []

    def run_grid(self, grid: Grid) -> None:
        plan = PlanFile(grid, str(self.output_dir))
        prepare(plan, self.output_dir)
        assert Worker(self.output_dir, PlanFile.read(self.output_dir), self, Terms(), self.results.append).run()

    def submit(self, attempt: Attempt) -> Future[None]:
        cell, folder = attempt.cell, attempt.claim.cell_folder
        self.order.append(f"{cell.label}-{cell.kind}-{cell.seed}")
        if cell.label in self.failing:
            write_json(folder / FAILURE_FILE, {"reason": "it failed"})
        else:
            if cell.save_adapter:
                (folder / "model.safetensors").write_text("weights")
            self.report.write(folder)
        done = Future[None]()
        done.set_result(None)
        return done

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture(scope="module")
def recorder(tmp_path_factory, saved_models, data):
    """The class above, with a report to leave."""
    folder = tmp_path_factory.mktemp("report")
    arguments = {"model_name_or_path": str(saved_models["encoder_decoder"]), "max_steps": 1, **data}
    patch = pytest.MonkeyPatch()
    # Planning is tried elsewhere.
    patch.setattr(worker_module.Arranger, "__call__", lambda self, cells: (list(cells), []))
    Recorder.report = run_cell(Cell("method", "summarization", {**arguments, "peft_method": "lora"}, {}), folder)
    yield Recorder
    patch.undo()


CHAIN = [
    {"name": "grandchild", "peft_method": "full", "teacher_model": "{student}"},
    {"name": "student", **STUDENT},
    "lora",
    {"name": "teacher", "peft_method": "full"},
]


def test_what_others_refer_to_runs_first(recorder, small, tmp_path):
    grid = grid_of(CHAIN, tmp_path, small, seeds=2)
    runner = recorder(tmp_path)
    runner.run_grid(grid)
    order = [name for name in runner.order if not name.startswith("lora")]
    assert order[0] == "base-base-42"
    assert [name.split("-")[0] for name in order[1:]] == ["teacher"] * 2 + ["student"] * 2 + ["grandchild"] * 2
    cells = {(result.cell.label, result.cell.seed): result.cell for result in runner.results}
    for seed in (42, 43):
        assert cells["student", seed].after == {"teacher": cells["teacher", seed].name}
        assert cells["grandchild", seed].after == {"student": cells["student", seed].name}
        placed = cells["student", seed].placed(tmp_path / CELLS)
        assert placed.arguments["teacher_model"] == str(tmp_path / CELLS / cells["teacher", seed].name)
        assert cells["student", seed].arguments["teacher_model"] == "{teacher}"
    assert {label for (label, _), cell in cells.items() if cell.save_adapter} == {"teacher", "student"}
    again = recorder(tmp_path)
    again.run_grid(grid)
    assert again.order == []
    assert len(again.results) == len(runner.results)


def test_a_cell_is_known_by_what_it_refers_to(recorder, small, tmp_path):
    """Not by a path: the same comparison has the same cells in every folder."""

    def names(folder: Path, **changes: Any) -> dict[str, str]:
        runner = recorder(folder)
        runner.run_grid(grid_of([{**TEACHER_AND_STUDENT[0], **changes}, TEACHER_AND_STUDENT[1]], folder, small))
        return {result.cell.label: result.cell.name for result in runner.results}

    first = names(tmp_path / "a")
    assert names(tmp_path / "b") == first
    other = names(tmp_path / "a", weight_decay=0.1)
    assert other["teacher"] != first["teacher"]
    assert other["student"] != first["student"]


def test_trials_come_before_the_runs_that_others_refer_to(recorder, small, tmp_path):
    grid = grid_of(TEACHER_AND_STUDENT, tmp_path, small, tune="learning_rate", tune_factors=(1,))
    runner = recorder(tmp_path)
    runner.run_grid(grid)
    expected = ["base-base-42", "teacher-trial-42", "teacher-method-42", "student-trial-42", "student-method-42"]
    assert runner.order == expected
    cells = {(result.cell.label, result.cell.kind): result.cell for result in runner.results}
    assert cells["student", "trial"].after == {"teacher": cells["teacher", "method"].name}
    assert cells["teacher", "method"].tuning is not None


def test_what_refers_to_a_failed_setting_is_left_out_and_run_once_it_is_there(recorder, small, tmp_path):
    grid = grid_of(CHAIN, tmp_path, small)
    runner = recorder(tmp_path, failing=("teacher",))
    runner.run_grid(grid)
    failures = {result.cell.label: result.failure for result in runner.results if result.failure}
    assert failures["student"] == "Left out: it refers to the result of 'teacher', which has none."
    assert failures["grandchild"] == "Left out: it refers to the result of 'student', which has none."
    assert len(runner.results) == 5
    again = recorder(tmp_path)
    again.run_grid(grid)
    assert again.order == ["teacher-method-42", "student-method-42", "grandchild-method-42"]
    assert not [result for result in again.results if result.failure]


def test_weights_that_are_gone_are_made_again_where_they_are_needed(recorder, small, tmp_path):
    grid = grid_of(CHAIN, tmp_path, small)
    first = recorder(tmp_path)
    first.run_grid(grid)
    for file in tmp_path.glob("cells/*/*.safetensors"):
        file.unlink()
    idle = recorder(tmp_path)
    idle.run_grid(grid)
    assert idle.order == []
    cells = {result.cell.label: result.cell for result in first.results}
    (tmp_path / CELLS / cells["grandchild"].name / REPORT_FILE).unlink()
    again = recorder(tmp_path)
    again.run_grid(grid)
    assert again.order == ["teacher-method-42", "student-method-42", "grandchild-method-42"]


def compare(python: str, output_dir: Path, config: Path) -> list[str]:
    return [python, "-m", "left_trainer.cli.main", "compare", "--output_dir", str(output_dir), "--config", str(config)]


# What has to be there before the comparison is killed.
MOMENTS = {
    "the teacher is saved": "cells/*-teacher-*/model.safetensors",
    "the student trains": "cells/*-student-*/claim-*/run/progress.txt",
}


@pytest.mark.timeout(300)
def test_killed_at_teacher_and_student_it_gives_the_same_scores(small, python, tmp_path):
    config = tmp_path / "grid.yaml"
    smaller_student = {**TEACHER_AND_STUDENT[1], "shrink_to": "decoder_layers=1", "shrink_kwargs": "schedule=at_start"}
    methods = [
        TEACHER_AND_STUDENT[0],
        smaller_student,
        {"name": "a/b <i>", "peft_method": "lora", "model_name_or_path": "{teacher}"},
    ]
    config.write_text(json.dumps({**small, "tasks": "summarization", "methods": methods}))
    command = compare(python, tmp_path / "out", config)
    for file in MOMENTS.values():
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            while not list((tmp_path / "out").glob(file)):
                assert process.poll() is None
                time.sleep(0.01)
            kill(process)
        assert process.returncode == -signal.SIGKILL
    last = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert last.returncode == 0, last.stdout[-2000:] + last.stderr[-2000:]
    found = {result.cell.label: result for result in read_cells(tmp_path / "out").values()}
    assert set(found) == {"base", "teacher", "student", "a/b <i>"}
    for label, result in found.items():
        assert result.report.setting == (None if label == "base" else label)
    kept = {folder.parent.name for folder in (tmp_path / "out").glob("cells/*/*.safetensors")}
    assert kept == {found["teacher"].cell.name}
    for label in ("teacher", "student"):
        folder = tmp_path / "out" / CELLS / f"again-{label}"
        folder.mkdir()
        assert run_cell(found[label].cell, folder).metrics.after["loss"] == found[label].report.metrics.after["loss"]
    sizes = {label: result.report.base_parameters for label, result in found.items()}
    assert sizes["base"] == sizes["teacher"] == sizes["a/b <i>"] > sizes["student"]
    assert (tmp_path / "out" / "quality_size.png").is_file()
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| student |" in text
    assert "a/b \\<i>" in text


@pytest.mark.parametrize("model_type", ["t5", "bart", "llama", "gpt2"])
def test_the_smaller_set_has_every_way(model_type):
    settings = [read_setting(entry) for entry in smaller(tiny_model(model_type).config, {"max_steps": 3})]
    labels = [setting.label for setting in settings]
    assert labels[:2] == ["teacher", "student"]
    assert len(set(labels)) == len(labels) == 2 + len(LOSSES) + 2 * len(SIZES)
    taught = [setting for setting in settings if setting.arguments.get("teacher_model") == "{teacher}"]
    assert {setting.arguments["shrink_to"] for setting in taught} == {settings[1].arguments["shrink_to"]}
    assert ("encoder_layers" in settings[1].arguments["shrink_to"]) == (model_type in ("t5", "bart"))
    assert {setting.arguments.get("max_steps") for setting in settings[1 : 2 + len(LOSSES)]} == {3}
    assert not any("max_steps" in setting.arguments for setting in (settings[0], *settings[2 + len(LOSSES) :]))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("model", ["embedded/t5", "embedded/llama"])
def test_a_printed_set_is_the_same_comparison(name, model, tmp_path, capsys):
    flags = ["--set", name, "--model_name_or_path", model, "--seeds", "3"]
    assert main(["compare", *flags, "--print_config"]) == 0
    text = capsys.readouterr().out
    content = yaml.safe_load(text)
    assert (content["seeds"], content["model_name_or_path"]) == (3, model)
    if name == "smaller":
        assert content["methods"] == set_options(name, {"model_name_or_path": model})["methods"]
    (tmp_path / "grid.yaml").write_text(text)
    assert main(["compare", "--config", str(tmp_path / "grid.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == text


def test_what_is_given_beats_the_set(capsys):
    assert main(["compare", "--set", "smaller", "--methods", "lora", "--print_config"]) == 0
    content = yaml.safe_load(capsys.readouterr().out)
    assert (content["methods"], content["tasks"]) == (["lora"], ["summarization"])
    with pytest.raises(SystemExit):
        main(["compare", "--set", "smalller"])
    assert "Did you mean 'smaller'?" in capsys.readouterr().err
