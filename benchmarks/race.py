"""Race LeftTrainer against the plain stack: same weights, same batches, same seed, in one run.

    python benchmarks/race.py                                  # all that this machine can run
    python benchmarks/race.py --races mt5_small_lora --pairs 3
    python benchmarks/race.py --list

The two sides of a race live in a process each, so that memory is their own, and take turns, so that whatever else the
machine does hits both. A race whose sides disagree about the losses is refused.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

from race_report import Record, markdown, write_records
from races import MEASURES, RACES, RIVALS, Race, Turn, tiny

SHARED = Path(__file__).parents[2] / "shared"
RESULTS = Path(__file__).parent / "results" / "races.json"
# A peak is measured once, and what the allocator keeps for reuse is in it: between equal runs of a process on a CPU it
# differs by some 10 MiB, whatever the size.
MEMORY_NOISE = 0.02
MEMORY_NOISE_BYTES = 16 * 2**20
SECONDS_TO_END = 10


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences between the sides that the rounding of a dtype explains."""

    loss: float
    gradient_norm: float
    score: float = 1e-2  # a tie between two tokens, broken differently by rounding, moves a whole text


TOLERANCES = {"float32": Tolerance(1e-5, 1e-4), "bfloat16": Tolerance(1e-2, 5e-2)}


class RaceError(Exception):
    """A side stopped."""

    status = "failed"


class RaceRefusedError(RaceError):
    """The sides disagree."""

    status = "refused"


class Side:
    """One side of a race, a context manager around its process.

    Args:
        name: For messages.
        work: Serves `Turn`s over a connection, its first argument, until that is closed. A function of a module.
        arguments: Further ones of `work`.
    """

    def __init__(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        # Spawned, because a forked child of a process that has used torch's threads can hang.
        context = get_context("spawn")
        self.name = name
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.close()  # which a side that waits takes as the end
        self.process.join(SECONDS_TO_END)
        self.process.terminate()
        self.process.join()

    def take_turn(self) -> Turn:
        """Have the side do its work once more. Raises `RaceError` with what stopped it."""
        try:
            self.connection.send("go")
            message = self.connection.recv()
        except (EOFError, BrokenPipeError):
            self.process.join()
            raise RaceError(f"side {self.name!r} ended with exit code {self.process.exitcode}") from None
        if isinstance(message, str):
            raise RaceError(f"side {self.name!r} stopped:\n{message}")
        return message


def run_side(connection: Connection, race: Race, name: str, device: str, shared: Path, folder: str) -> None:
    """Import the libraries, which takes seconds, in the side's process only."""
    import side

    side.run_side(connection, race, name, device, shared, folder)


def run_race(race: Race, device: str, pairs: int, shared: Path, control: bool = False) -> Record:
    """Race the sides for `pairs` turns each, after a warm-up.

    Args:
        race: The race.
        device: `cpu` or `cuda`.
        pairs: Number of turns of each side that count.
        shared: Folder with `data/`.
        control: Put the rival in LeftTrainer's place too: what comes out differs from 1 by noise alone.

    Raises:
        RaceError: A side stopped.
        RaceRefusedError: The sides differ in more than rounding.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = (race.rival, race.rival if control else "left")
        return run_sides(race, [Side(name, run_side, race, name, device, shared, folder) for name in names], pairs)


def run_sides(race: Race, sides: Sequence[Side], pairs: int) -> Record:
    """Let the rival and our side take turns, and compare them. Arguments and errors as of `run_race`."""
    turns: tuple[list[Turn], list[Turn]] = ([], [])
    with ExitStack() as stack:
        for side in sides:
            stack.enter_context(side)
        for number in range(1 + pairs):
            for side, taken in zip(sides, turns, strict=True):
                taken.append(side.take_turn())
            print(f"{race.name}: {f'pair {number} of {pairs}' if number else 'warm-up'}", file=sys.stderr, flush=True)
    rival, ours = turns
    differences = compare(race, rival, ours)
    return summarize(race, rival, ours) | {"differences": differences}


def compare(race: Race, rival: Sequence[Turn], ours: Sequence[Turn]) -> dict[str, float]:
    """The largest relative differences over all turns.

    Raises:
        RaceRefusedError: One is larger than what the dtype's rounding explains.
    """
    tolerance = TOLERANCES[race.dtype]
    allowed = {"losses": race.loss_tolerance or tolerance.loss, "scores": tolerance.score}
    if race.rival != "frozen":  # which has no gradients of its own
        allowed["gradient_norms"] = tolerance.gradient_norm
    found = {}
    for kind, limit in allowed.items():
        found[kind] = 0.0
        for number, (theirs, mine) in enumerate(zip(rival, ours, strict=True)):
            expected, got = values(theirs, kind), values(mine, kind)
            differences = list(map(relative_difference, expected, got))
            if len(expected) != len(got) or not all(difference <= limit for difference in differences):  # NaN as well
                raise RaceRefusedError(
                    f"{kind} of turn {number} differ by more than {limit:g} of their size:\n"
                    f"  {race.rival}: {expected}\n  LeftTrainer: {got}"
                )
            found[kind] = max(found[kind], *differences, 0.0)
    return found


def values(turn: Turn, kind: str) -> list[float]:
    """The figures of one kind: a list of steps, or the scores."""
    figures = getattr(turn, kind)
    return list(figures.values()) if isinstance(figures, dict) else figures


def relative_difference(expected: float, got: float) -> float:
    """Of the second from the first."""
    return abs(got - expected) / max(abs(expected), 1e-12)


def summarize(race: Race, rival: Sequence[Turn], ours: Sequence[Turn]) -> Record:
    """The figures of a race and what they reach. The first turn of each side is the warm-up, which has the memory."""
    speeds = [theirs.seconds / mine.seconds for theirs, mine in zip(rival[1:], ours[1:], strict=True)]
    speed = {"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds)}
    above = {"rival": rival[0].peak_bytes - rival[0].weights_bytes, "ours": ours[0].peak_bytes - ours[0].weights_bytes}
    memory = above["ours"] / above["rival"] if above["rival"] > 0 else None
    reached = {}
    if race.target:
        # "Not worse beyond noise" is met unless every single pair says otherwise.
        reached["speed"] = speed["max" if race.target.speed == 1 else "median"] >= race.target.speed
        if race.target.memory and memory is not None:
            noise = MEMORY_NOISE + MEMORY_NOISE_BYTES / above["rival"] if race.target.memory == 1 else 0
            reached["memory"] = memory <= race.target.memory + noise
    return {
        "status": "run",
        "speed": speed,
        "memory": memory,
        "reached": reached,
        "sides": {
            name: {
                "seconds": [turn.seconds for turn in turns[1:]],
                "first_seconds": turns[0].first_seconds,
                "losses": turns[0].losses,
                "scores": turns[0].scores,
                "weights_bytes": turns[0].weights_bytes,
                "peak_bytes": turns[0].peak_bytes,
            }
            for name, turns in (("rival", rival), ("ours", ours))
        },
    }


def reason_not_to_run(race: Race, device: str, shared: Path) -> str | None:
    """What this machine lacks for `race`."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "needs a GPU"
    if race.data not in (None, "embedded") and not (shared / "data" / race.data).is_dir():
        return f"needs {shared / 'data' / race.data}"
    return None


def list_races() -> str:
    """The races, for `--list`."""
    lines = []
    for race in RACES.values():
        target = race.target
        wanted = "reported only" if target is None else f"wanted {target.speed:.3g} times as fast"
        wanted += f", {target.memory:g} of the memory" if target and target.memory else ""
        lines.append(f"{race.name}: {race.method}, {MEASURES[race.measure]}, {race.device}, {wanted}")
        lines.append(f"    against {RIVALS[race.rival]}")
    return "\n".join(lines)


def environment() -> Record:
    """What the figures depend on beside the race."""
    import torch

    from left_trainer.runs.measurements import machine_name
    from left_trainer.trainer.model_card import package_versions

    return {"machine": machine_name(), "threads": torch.get_num_threads(), "versions": package_versions()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--races", nargs="+", default=list(RACES), choices=list(RACES), metavar="NAME")
    parser.add_argument("--list", action="store_true", help="list the races, run nothing")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side that count")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default the one that the race is meant for")
    parser.add_argument("--tiny", action="store_true", help="a toy size: shows that the sides agree, not how fast")
    parser.add_argument("--control", action="store_true", help="the rival against itself: shows the noise")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with data/")
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS}; none with --tiny and --control")
    options = parser.parse_args()
    if options.list:
        print(list_races())
        return

    file = options.results or (None if options.tiny or options.control else RESULTS)
    common, records = environment(), []
    for name in options.races:
        race = tiny(RACES[name]) if options.tiny else RACES[name]
        device = options.device or race.device
        record = {**asdict(race), "device": device, "pairs": options.pairs, "control": options.control, **common}
        reason = reason_not_to_run(race, device, options.shared)
        if reason:
            record |= {"status": "not run", "reason": reason}
        else:
            try:
                record |= run_race(race, device, options.pairs, options.shared, options.control)
            except RaceError as error:
                record |= {"status": error.status, "reason": str(error)}
        records.append(record)
        if file:
            write_records([record], file)
    print(markdown(records))
    versions = ", ".join(f"{package} {version}" for package, version in common["versions"].items())
    print(f"\n{common['machine']}, {common['threads']} threads; {versions}")
    if any(record["status"] in ("refused", "failed") for record in records):
        sys.exit(1)


if __name__ == "__main__":
    main()
