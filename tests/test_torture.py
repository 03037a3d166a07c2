"""The share of the campaign that `make test` runs; `make torture` runs all of it."""

from __future__ import annotations

import pytest

from torture.case import NotRunError, all_cases

CASES = list(all_cases())


@pytest.mark.parametrize("case", [case for case in CASES if case.quick], ids=lambda case: f"{case.kind}-{case.name}")
def test_right(case, python, tmp_path, monkeypatch):
    monkeypatch.setenv("TORTURE_PYTHON", str(python))
    try:
        case.check(tmp_path)
    except NotRunError as error:
        pytest.skip(str(error))


def test_each_case_has_a_name_of_its_own():
    names = [(case.kind, case.name) for case in CASES]
    assert len(names) == len(set(names))
