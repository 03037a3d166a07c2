"""Plans against what torch's profiler records, on models of millions of parameters; `benchmarks/memory_parity.py`."""

from __future__ import annotations

import sys

import pytest

from places import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from memory_parity import MODELS, SETTINGS, SMALL, compare

WORST = 0.02
CASES = [(model, setting) for model in MODELS for setting in SETTINGS]
# Each setting once and each model about twice; the rest takes four times as long.
QUICK = [(list(MODELS)[index % len(MODELS)], setting) for index, setting in enumerate(SETTINGS)]


@pytest.mark.parametrize(
    ("model", "setting"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.long) for case in CASES]
)
def test_a_plan_has_the_bytes_that_the_profiler_records(model, setting):
    assert abs(compare(model, setting, SMALL).error) <= WORST
