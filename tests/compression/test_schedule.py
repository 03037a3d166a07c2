"""When parts go, and how many."""

from __future__ import annotations

import pytest

from left_trainer.compression.schedule import Stage, stages
from left_trainer.compression_options import ShrinkOptions


def test_at_start_is_before_the_first_step():
    assert stages(ShrinkOptions(schedule="at_start"), 100) == (Stage(0, 1.0),)


@pytest.mark.parametrize("schedule", ["linear", "cubic"])
def test_the_last_size_is_reached_at_the_end_that_was_asked_for(schedule):
    found = stages(ShrinkOptions(schedule=schedule, end=0.5, n_shrinks=4), 80)
    assert [stage.step for stage in found] == [10, 20, 30, 40]
    expected = [0.25, 0.5, 0.75, 1] if schedule == "linear" else [1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1]
    assert [stage.progress for stage in found] == pytest.approx(expected)


@pytest.mark.parametrize("max_steps", [1, 2, 3, 7])
def test_removals_on_one_step_are_made_together(max_steps):
    found = stages(ShrinkOptions(n_shrinks=8), max_steps)
    steps = [stage.step for stage in found]
    assert steps == sorted(set(steps))
    assert 1 <= steps[0] <= steps[-1] <= max_steps
    assert found[-1].progress == 1


def test_a_list_of_steps_removes_as_much_at_each():
    assert stages(ShrinkOptions(schedule=[3, 5]), 5) == (Stage(3, 0.5), Stage(5, 1.0))


def test_a_step_beyond_the_end_is_refused():
    with pytest.raises(ValueError, match=r"schedule=\[3, 6\], and the training ends after 5 steps"):
        stages(ShrinkOptions(schedule=[3, 6]), 5)
