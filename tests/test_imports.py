"""Imports without garbage collection."""

from __future__ import annotations

import ast
import contextlib
import gc
import sys
from pathlib import Path

import pytest

import left_trainer
from left_trainer import imports
from left_trainer.cli.main import COMMANDS

CLI = Path(left_trainer.__file__).parent / "cli"


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_afterwards_as_it_was(enabled):
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with contextlib.suppress(ZeroDivisionError), imports.without_collection():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_the_stack_is_imported_once_without_collection_and_frozen(tmp_path, monkeypatch):
    content = "import gc\nWAS_ENABLED = gc.isenabled()\nHELD = [[] for _ in range(1000)]\n"
    (tmp_path / "made_stack.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "STACK", "made_stack")
    before = gc.get_freeze_count()
    try:
        imports.import_stack()
        assert not sys.modules["made_stack"].WAS_ENABLED
        assert gc.get_freeze_count() >= before + 1000
        gc.unfreeze()
        imports.import_stack()
        assert gc.get_freeze_count() == 0
    finally:
        gc.unfreeze()
        sys.modules.pop("made_stack", None)


def test_every_command_imports_the_stack_so():
    for command in COMMANDS:
        tree = ast.parse((CLI / f"{command}.py").read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert any(isinstance(call.func, ast.Name) and call.func.id == "import_stack" for call in calls), command
