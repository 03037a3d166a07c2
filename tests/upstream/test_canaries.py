"""Nothing of other packages is worked around or reached for without a test that tells when that changes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import package_walk
from canaries import DOCUMENTED, INTERNALS, STAMPED, UNMARKED, UNSTAMPED

TABLE = "tests/support/canaries.py"


def nodes() -> list[ast.AST]:
    """Of the syntax trees of the other tests of this folder."""
    paths = [path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
    return [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


@pytest.fixture(scope="module")
def internals() -> set[str]:
    return package_walk.internals()


def test_every_workaround_has_a_canary():
    found = set(package_walk.stamps())
    for place, library in sorted(found - set(STAMPED)):
        pytest.fail(f"{package_walk.home(place)} works around {library}: add a canary, and name both in {TABLE}.")
    for place, library in sorted(set(STAMPED) - found):
        pytest.fail(f"{place} does not name a version of {library} any more: remove its canary, and both from {TABLE}.")


def test_every_workaround_without_a_version_is_still_there():
    for place in UNSTAMPED:
        assert place in package_walk.definitions(), f"{place} is gone: remove its canary, and both from {TABLE}."


def test_every_place_that_a_canary_speaks_of_is_still_there():
    calls = [node for node in nodes() if isinstance(node, ast.Call) and ast.unparse(node.func) == "home"]
    for name in {node.args[0].value for node in calls if isinstance(node.args[0], ast.Constant)}:
        assert name in package_walk.definitions(), f"A canary speaks of {name}, which the package does not have."


def test_every_internal_has_a_canary(internals):
    for name in sorted(internals - set(INTERNALS) - set(DOCUMENTED)):
        pytest.fail(f"The package uses the internal {name}: add a canary for it, and name both in {TABLE}.")


def test_every_internal_with_a_canary_is_still_used(internals):
    text = "".join(text for text, _ in package_walk.sources().values())
    unused = {*INTERNALS, *DOCUMENTED} - internals | {name for name in UNMARKED if name not in text}
    for name in sorted(unused):
        pytest.fail(f"The package does not use {name} any more: remove its canary, and both from {TABLE}.")


def test_the_table_names_every_canary_and_no_other():
    named = {*INTERNALS.values(), *UNMARKED.values()}
    named |= {name for names in (*STAMPED.values(), *UNSTAMPED.values()) for name in names}
    functions = [node.name for node in nodes() if isinstance(node, ast.FunctionDef)]
    written = [name for name in functions if name.startswith("test_")]
    assert len(written) == len(set(written)), "Two canaries have the same name."
    for name in sorted(named - set(written)):
        pytest.fail(f"{TABLE} names {name}, which is no test of this folder.")
    for name in sorted(set(written) - named):
        pytest.fail(f"{name} is a canary that {TABLE} does not name.")
