"""From a recording to memory over time: the peak, what it consists of, and where in the step it lies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from left_trainer.recording.recorder import Block, Event, Part, Phase, Recording


@dataclass(frozen=True)
class Moment:
    """Memory at one moment.

    Args:
        n_bytes: All that is allocated.
        phase: Of the step.
        module: That ran; empty between modules.
        parts: Bytes of each part.
        activations: Bytes of the activations by the type of the module that made them.
    """

    n_bytes: int
    phase: Phase
    module: str
    parts: dict[Part, int]
    activations: dict[str, int]


def part_of(block: Block) -> Part:
    """What a block holds, from what is known of it or from when it lived."""
    if block.part is not None:
        return block.part
    if block.phase == "loading":
        return "frozen weights"
    if block.phase in ("forward", "backward") and block.outlived_forward:
        return "activations"
    return "temporaries"


def peak(recording: Recording, is_steady: bool = True) -> Moment:
    """The moment of most memory.

    Args:
        recording: Of a step.
        is_steady: Whether it stands for one of many steps, in which the optimizer state is there from the start.
    """
    return moment(recording, peak_event(recording, is_steady), is_steady)


def peak_event(recording: Recording, is_steady: bool = True) -> int:
    """The number of the event after which the most is allocated; as for `peak`."""
    most, at = 0, 0
    for index, n_bytes in enumerate(levels(recording.events, is_steady)):
        if n_bytes > most and recording.events[index].phase != "loading":
            most, at = n_bytes, index
    return at


def levels(events: list[Event], is_steady: bool = True) -> Iterator[int]:
    """Bytes after each event."""
    total = sum(event.block.n_bytes for event in events if is_steady and _is_state(event) and event.is_allocation)
    for event in events:
        if not (is_steady and _is_state(event)):
            total += event.block.n_bytes if event.is_allocation else -event.block.n_bytes
        yield total


def moment(recording: Recording, at: int, is_steady: bool = True) -> Moment:
    """Memory after event number `at`."""
    parts: dict[Part, int] = defaultdict(int)
    activations: dict[str, int] = defaultdict(int)
    for block in live_blocks(recording, at, is_steady):
        part = part_of(block)
        parts[part] += block.n_bytes
        if part == "activations":
            activations[block.module_type] += block.n_bytes
    event = recording.events[at]
    module = event.block.module if event.is_allocation else ""
    return Moment(sum(parts.values()), event.phase, module, dict(parts), dict(activations))


def live_blocks(recording: Recording, at: int, is_steady: bool = True) -> list[Block]:
    """What is allocated after event number `at`."""
    live: dict[int, Block] = {}
    for index, event in enumerate(recording.events):
        is_state = is_steady and _is_state(event)
        if index > at and not is_state:
            continue
        if event.is_allocation:
            live[id(event.block)] = event.block
        elif not is_state:
            live.pop(id(event.block), None)
    return list(live.values())


def _is_state(event: Event) -> bool:
    return event.block.part == "optimizer state"


def timeline(recording: Recording, n_samples: int, is_steady: bool = True) -> tuple[tuple[Phase, int], ...]:
    """The phase and the most memory in each of `n_samples` equal parts of the operations; `is_steady` as for `peak`."""
    n_operations = max(len(recording.operations), 1)
    samples: list[tuple[Phase, int] | None] = [None] * n_samples
    for event, n_bytes in zip(recording.events, levels(recording.events, is_steady), strict=True):
        if event.phase == "loading":
            continue
        index = min(event.operation * n_samples // n_operations, n_samples - 1)
        known = samples[index]
        if known is None or n_bytes > known[1]:
            samples[index] = (event.phase, n_bytes)
    found: list[tuple[Phase, int]] = []
    for sample in samples:
        if sample is not None or found:
            found.append(sample or found[-1])
    return tuple(found)
