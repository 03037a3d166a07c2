"""When a model loses parts, and how many of those that it is to lose."""

from __future__ import annotations

from dataclasses import dataclass

from left_trainer.compression_options import ShrinkOptions

AT_START = "at_start"


@dataclass(frozen=True)
class Stage:
    """A removal.

    Args:
        step: Number of optimizer steps before it; 0 is before the first.
        progress: Share of all that is to be removed that is gone afterwards, above 0 and at most 1.
    """

    step: int
    progress: float


def stages(options: ShrinkOptions, max_steps: int) -> tuple[Stage, ...]:
    r"""The removals of a training, from the first to the last.

    At a share $t$ of the time until `end`, $t$ of the removal is done with `linear`, and $1 - (1 - t)^3$ with `cubic`
    (Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878): much at first, while there is much to spare. A list of
    steps removes as much at each. Removals that would fall on one step are made together.

    Args:
        options: Of the run.
        max_steps: Optimizer steps of the whole training.

    Raises:
        ValueError: A step of the list is beyond the end of the training.
    """
    if options.schedule == AT_START:
        return (Stage(0, 1.0),)
    if isinstance(options.schedule, str):
        number, last = options.n_shrinks, max(1, round(options.end * max_steps))
        times = {max(1, round(last * index / number)): index / number for index in range(1, number + 1)}
        cubic = options.schedule == "cubic"
        return tuple(Stage(step, 1 - (1 - time) ** 3 if cubic else time) for step, time in times.items())
    check_steps(options.schedule, max_steps)
    return tuple(Stage(step, (index + 1) / len(options.schedule)) for index, step in enumerate(options.schedule))


def check_steps(steps: list[int], max_steps: int) -> None:
    """Raise `ValueError` where the last of `steps` is beyond the end of a training of `max_steps` optimizer steps."""
    if steps[-1] > max_steps:
        raise ValueError(
            f"shrink_kwargs has schedule={steps!r}, and the training ends after {max_steps} steps: the model would not "
            f"reach its size. Use steps up to {max_steps}, or train longer."
        )
