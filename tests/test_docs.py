"""What the documentation shows runs as it stands."""

from __future__ import annotations

import re

import pytest
from conftest import REPOSITORY, losses, tiny_model

from left_trainer import LeftTrainer, get_task, list_methods, list_tasks
from left_trainer.methods.registry import METHODS


@pytest.fixture
def registry():
    before = dict(METHODS._records)
    yield
    METHODS._records = before


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


def test_tables_list_what_is_registered():
    methods = (REPOSITORY / "docs" / "methods.md").read_text()
    for method in list_methods():
        row = re.search(rf"^\| `{method.name}` \|.*\| (\S+) \| (\S+) \|$", methods, flags=re.MULTILINE)
        assert float(row[1]) == method.learning_rate
        assert row[2] == ("-" if method.config_class is None else "yes" if method.mergeable else "no")
    tasks = (REPOSITORY / "docs" / "tasks.md").read_text()
    for task in list_tasks():
        assert f"| `{task.name}` | `{task.source_column}`, `{task.target_column}` |" in tasks
        assert get_task(task.name) is task


def test_every_page_is_in_the_navigation():
    navigation = (REPOSITORY / "mkdocs.yml").read_text()
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert page.name in navigation


def test_tests_named_in_the_documentation_exist():
    text = (REPOSITORY / "docs" / "correctness.md").read_text()
    for name in re.findall(r"`(tests/[\w/]+(?:\.py)?/?)`", text):
        assert (REPOSITORY / name).exists(), name
