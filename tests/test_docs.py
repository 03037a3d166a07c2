"""What the documentation shows runs as it stands."""

from __future__ import annotations

import dataclasses
import html
import importlib.util
import json
import re

import pytest

from left_trainer import DataArguments, LeftTrainer, ModelArguments, get_task, list_methods, list_tasks
from left_trainer.export.formats import FORMATS
from left_trainer.methods.learning_rates import format_rate
from left_trainer.methods.options import known_options
from left_trainer.methods.registry import METHODS
from left_trainer.runs.fine_tuning import fine_tune, set_up
from left_trainer.tasks.registry import TASKS
from log_history import losses
from places import REPOSITORY
from tiny import tiny_model


@pytest.fixture
def registry():
    with METHODS.temporarily():
        yield


@pytest.fixture
def task_registry():
    with TASKS.temporarily():
        yield


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / name).read_text(), flags=re.DOTALL)


def test_a_users_own_method_trains(registry, rows, make_args, tokenizers):
    exec(python_blocks("adding_a_method.md")[0], {})
    for model_type, family in (("bart", "encoder_decoder"), ("llama", "decoder_only")):
        args = make_args(peft_method="lora_everywhere", learning_rate=1e-2, overwrite_output_dir=True, max_steps=12)
        trainer = LeftTrainer(tiny_model(model_type), args, train_dataset=rows, processing_class=tokenizers[family])
        trainer.train()
        assert trainer.method.name == "lora_everywhere"
        assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize("family", ["encoder_decoder", "decoder_only"])
def test_a_users_own_task_trains_and_is_scored(family, task_registry, make_args, saved_models, tmp_path):
    exec(python_blocks("tasks.md")[0], {})
    task = get_task("headline")
    assert task in list_tasks()
    rows = tmp_path / "articles.jsonl"
    rows.write_text("\n".join(json.dumps({"article": f"It rained {i} mm.", "headline": "Rain"}) for i in range(8)))
    args = make_args(predict_with_generate=True, per_device_eval_batch_size=8)
    model = ModelArguments(model_name_or_path=str(saved_models[family]))
    report = fine_tune(set_up(task, model, DataArguments(train_file=str(rows)), args))
    assert report.task == "headline"
    assert task.main_metric in report.metrics.after


@pytest.fixture(scope="module")
def generator():
    """The hook that makes the pages of the methods."""
    spec = importlib.util.spec_from_file_location("generate_methods", REPOSITORY / "docs" / "generate_methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", list_methods(), ids=lambda method: method.name)
def test_every_method_has_a_page(method, generator):
    page = generator.method_page(method)
    facts = (method.paper, method.equation, method.when_to_use, method.learning_rate_source, method.summary[1:])
    for fact in (*facts, *method.unsupported.values(), *method.required.values(), *method.requires.values()):
        assert fact in page
    assert f"**Default learning rate**: {format_rate(method.learning_rate)}" in page
    assert f"{format_rate(method.narrow_learning_rate)} for models at most 128 wide" in page
    assert f'peft_method="{method.name}"' in page
    assert f"--peft_method {method.name}" in page
    for name in set(known_options(method)) - generator.COMMON_OPTIONS:
        assert f"| `{name}` |" in page
    for name, value in {**method.defaults, **method.preset}.items():
        assert re.search(rf"^\| `{name}` \| .* \| `{re.escape(repr(value))}` \|", page, flags=re.MULTILINE)
    assert method.config_class is None or " object at 0x" not in page


def test_peft_own_texts_stay_with_peft(generator):
    for method in list_methods():
        page = generator.method_page(method)
        for field in dataclasses.fields(method.config_class) if method.config_class else ():
            help_text = field.metadata.get("help", "")
            if not method.config_class.__module__.startswith("left_trainer") and len(help_text) > 40:
                assert help_text[:40] not in page


def test_the_overview_links_every_page(generator):
    assert generator.OVERVIEW_MARK in (REPOSITORY / "docs" / generator.INDEX).read_text()
    overview = generator.overview()
    for method in list_methods():
        assert f"| [`{method.name}`]({method.name}.md) | {method.summary} |" in overview
        merges = "-" if method.config_class is None else "yes" if method.mergeable else "no"
        assert re.search(rf"\({method.name}\.md\).* \| {merges} \|$", overview, flags=re.MULTILINE)


def test_the_table_of_exports_has_every_method_and_format(generator):
    page = (REPOSITORY / "docs" / generator.EXPORTS).read_text()
    assert generator.EXPORTS_MARK in page
    table = generator.exports()
    assert all(f"`{name}`" in page for name in FORMATS)
    assert table.count("\n") == len(list_methods()) + 1
    for row in (
        "| [`lora`](methods/lora.md) | yes | yes | yes | yes | exact |",
        "| [`vera`](methods/vera.md) | yes | yes | yes | yes | approximated |",
        "| [`dora`](methods/dora.md) | yes | yes | yes | yes | - |",
        "| [`prompt_tuning`](methods/prompt_tuning.md) | - | - | - | - | - |",
        "| [`full`](methods/full.md) | - | yes | yes | yes | - |",
    ):
        assert row in table


def test_equations_become_mathml(generator):
    pytest.importorskip("latex2mathml", reason="comes with the docs extra")
    for method in list_methods():
        marked = f'<div class="arithmatex">\\[\n{html.escape(method.equation, quote=False)}\n\\]</div>'
        mathml = generator.to_mathml(marked)
        assert mathml.startswith("<math")
        # A command that the converter does not know is left as it was written.
        assert "\\" not in mathml, method.name


def test_the_table_of_tasks_lists_what_is_registered():
    tasks = (REPOSITORY / "docs" / "tasks.md").read_text()
    for task in list_tasks():
        assert f"| `{task.name}` | `{task.source_column}`, `{task.target_column}` |" in tasks
        assert get_task(task.name) is task
        prompt = task.prompt.replace("\n", "\\n")
        assert re.search(
            rf"^\| `{task.name}` \|.*\| `{re.escape(prompt)}` \|.*\| `{task.main_metric}` \|$", tasks, re.MULTILINE
        )
        hub = task.hub_dataset
        columns = f"`{hub.source_column}`, `{hub.target_column}`"
        configuration = f"`{hub.config_name}`" if hub.config_name else "-"
        assert f"| `{task.name}` | `{hub.name}` | {configuration} | {columns} |" in tasks


def test_every_page_is_in_the_navigation():
    navigation = (REPOSITORY / "mkdocs.yml").read_text()
    for page in (REPOSITORY / "docs").rglob("*.md"):
        assert str(page.relative_to(REPOSITORY / "docs")) in navigation


def test_tests_named_in_the_documentation_exist():
    text = (REPOSITORY / "docs" / "correctness.md").read_text()
    for name in re.findall(r"`(tests/[\w/]+(?:\.py)?/?)`", text):
        assert (REPOSITORY / name).exists(), name


def test_the_architecture_page_names_every_folder_and_real_files():
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    package = REPOSITORY / "left_trainer"
    for folder in package.iterdir():
        if (folder / "__init__.py").exists():
            assert re.search(rf"\b{folder.name}\b", text), folder.name
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", text):
        assert any((root / name).exists() for root in (package, REPOSITORY)), name
    for title in ("From the flag to the adapter", "From a row to its loss"):
        modules = re.findall(r"^\| `(\S+)` \|", text.partition(title)[2].partition("##")[0], flags=re.MULTILINE)
        assert len(modules) == len(set(modules)) <= 8
