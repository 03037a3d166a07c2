"""Methods and tasks of a user, in the commands and in the processes that these start."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from left_trainer.cli.main import main
from left_trainer.methods.registry import METHODS
from left_trainer.plugins import load_plugins
from left_trainer.tasks.registry import TASKS
from processes import ENVIRONMENT

PLUGIN = """
from peft import LoraConfig

import words_of_mine
from left_trainer import PeftMethod, Task, register_method, register_task

register_method(
    PeftMethod(
        name="my_lora",
        family="reparameterization",
        summary="a low-rank update",
        paper="none",
        config_class=LoraConfig,
        learning_rate=1e-3,
        learning_rate_source="a guess",
        preset={"use_rslora": True},
        defaults={"r": 2},
        mergeable=True,
    )
)
register_task(
    Task(
        name="my_task",
        summary="copies a word",
        source_column="text",
        target_column="label",
        prompt=words_of_mine.PROMPT,
        metrics=("exact_match",),
        main_metric="exact_match",
        max_new_tokens=3,
        generate_row=lambda random: {"text": str(random.random()), "label": words_of_mine.WORD},
        embedded_splits={"train": 16, "validation": 4, "test": 4},
    )
)
"""
RUN = ["--max_steps", "2", "--report_plan", "false", "--per_device_train_batch_size", "4"]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A plugin that imports a module beside it; nothing of it is left afterwards."""
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    (tmp_path / "words_of_mine.py").write_text('PROMPT, WORD = "Copy: {source}", "word"\n')
    monkeypatch.setattr(sys, "path", [*sys.path])
    with METHODS.temporarily(), TASKS.temporarily():
        yield str(tmp_path / "my_plugin.py")
    for name in ("my_plugin", "words_of_mine"):
        sys.modules.pop(name, None)


def test_a_method_and_a_task_of_a_file_in_every_command(plugin, tmp_path, capsys):
    run, rows = str(tmp_path / "run"), tmp_path / "rows.jsonl"
    names = ["--plugin", plugin]
    mine = [*names, "--task", "my_task", "--peft_method", "my_lora"]
    assert main(["train", *mine, *RUN, "--output_dir", run]) == 0
    report = json.loads((tmp_path / "run" / "training_report.json").read_text())
    assert (report["method"], report["task"]) == ("my_lora", "my_task")
    rows.write_text('{"text": "a", "label": "word"}\n')
    assert main(["evaluate", "--adapter", run, "--test_file", str(rows), *names]) == 0
    assert main(["generate", "--adapter", run, "--input_file", str(rows), *names]) == 0
    assert main(["merge", "--adapter", run, "--output_dir", str(tmp_path / "merged"), *names]) == 0
    assert main(["plan", *mine, "--source_tokens", "8", "--target_tokens", "4", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["methods", "my_lora", *names]) == 0
    assert "a low-rank update" in capsys.readouterr().out


def test_the_processes_of_a_comparison_have_it_too(plugin, tmp_path, capsys, python, monkeypatch):
    """Named in YAML, by a path that is not absolute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    config = tmp_path / "grid.yaml"
    config.write_text("plugin: [my_plugin.py]\nmethods: [my_lora]\ntasks: [my_task]\nmax_steps: 2\n")
    assert main(["compare", "--config", str(config), "--output_dir", "out", "--print_config"]) == 0
    assert f"plugin: [{plugin}]" in capsys.readouterr().out
    assert main(["compare", "--config", str(config), "--output_dir", "out"]) == 0
    cells = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("cell.json")]
    assert len(cells) == 2
    assert all(cell["plugins"] == [plugin] for cell in cells)
    assert "my_lora" in (tmp_path / "out" / "table.md").read_text()
    assert main(["report", "out", "--plugin", plugin]) == 0


def test_yaml_of_a_training_names_modules(plugin, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("plugin: my_plugin\npeft_method: my_lora\nmax_steps: 2\nreport_plan: false\n")
    words = ["--config", "run.yaml", "--task", "my_task", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *words]) == 0


BROKEN = {
    "missing.py": (None, r"plugin='.*missing.py' does not exist"),
    "syntax.py": ("x = (", r"plugin='.*syntax.py' cannot be loaded: SyntaxError: .* \(.*syntax.py, line 1\)"),
    "raises.py": ("\n1 / 0", r"cannot be loaded: ZeroDivisionError: division by zero \(.*raises.py, line 2\)"),
    "imports.py": ("import no_such_module", r"cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
    "exits.py": ("raise SystemExit(3)", r"cannot be loaded: SystemExit: 3"),
    "json.py": ("", r"has the name of another module, .*json.*: Rename|has the name of another module, .*Rename"),
    "my-plugin.py": ("", "is no name of a module"),
    "taken.py": (
        "import dataclasses\nfrom left_trainer import get_method, register_method\n"
        "register_method(dataclasses.replace(get_method('lora'), summary='another'))",
        "cannot be loaded: ValueError: The method name 'lora' of .* is already taken",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_one_paragraph(name, tmp_path, capsys, monkeypatch):
    text, message = BROKEN[name]
    monkeypatch.setattr(sys, "path", [*sys.path])
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load_plugins([str(tmp_path / name)])
    assert "\n" not in str(raised.value)
    with pytest.raises(SystemExit) as stopped:
        main(["methods", "--plugin", str(tmp_path / name)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_module_that_is_not_there(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match="plugin='no_such_plugin' is neither a Python file nor a module"):
        load_plugins(["no_such_plugin"])


def test_installed_packages_are_found_and_a_broken_one_is_left_out(tmp_path, python):
    """In Python too, without a flag."""
    package = tmp_path / "mine-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[left_trainer]\ngood = my_plugin\nbad = my_broken_plugin\n")
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    (tmp_path / "words_of_mine.py").write_text('PROMPT, WORD = "Copy: {source}", "word"\n')
    (tmp_path / "my_broken_plugin.py").write_text("1 / 0\n")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from left_trainer import get_method, get_task; "
    code += "print(get_method('my_lora').summary, get_task('my_task').summary)"
    command = [python, "-c", code, str(tmp_path)]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.stdout == "a low-rank update copies a word\n", result.stderr
    assert "The plugin 'bad' of mine cannot be loaded: ZeroDivisionError" in result.stderr
