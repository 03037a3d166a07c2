"""Race the loss of a distillation step at the output heads against full logits and against TRL's chunked loss.

    python benchmarks/distillation_step.py
    python benchmarks/distillation_step.py --races mt5_small_float32 --pairs 3
    python benchmarks/distillation_step.py --tiny   # shows that the sides agree, not how fast they are

A step is the loss and its gradient for the student's hidden states; both heads are frozen, as with LoRA. The sides take
turns in a process each, as in `race.py`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch
from distilling_trainers import divergence_of_full_logits, trl_divergence
from race import RaceError, Side, environment, run_sides
from race_report import markdown, write_records
from races import Target, Turn
from side import timed
from torch.nn import functional

from left_trainer.callbacks.memory_counters import memory_counter
from left_trainer.kernels.linear_divergence import Divergence, Head, linear_divergence

RESULTS = Path(__file__).parent / "results" / "distillation_steps.json"
STEPS = 4  # of a turn
NOT_WORSE = Target(speed=1.0, memory=1.0)
HALF_THE_MEMORY = Target(speed=1.0, memory=0.5)


@dataclass(frozen=True)
class DistillationRace:
    """One race.

    Args:
        name: As in `--races`.
        rival: A key of `LOSSES`.
        words: Size of the vocabulary.
        student_width: Width of the student's hidden states.
        teacher_width: Width of the teacher's.
        rows: Target positions of a step.
        kind: Of the divergence.
        alpha: Part of the divergence in the loss.
        temperature: Of the divergence.
        dtype: Of weights and products.
        target: What has to be reached.
        loss_tolerance: Largest relative difference of the losses; by default the dtype's.
        published: There is nothing to compare with.
    """

    name: str
    rival: Literal["full_logits", "trl"]
    words: int
    student_width: int
    teacher_width: int
    rows: int = 256
    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    alpha: float = 0.5
    temperature: float = 2.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    target: Target = HALF_THE_MEMORY
    loss_tolerance: float | None = None
    published: None = None


def mt5_small(name: str, teacher_width: int, **options: str) -> DistillationRace:
    """8 rows of 32 target tokens, beside full logits."""
    return DistillationRace(name, "full_logits", 250_112, 512, teacher_width, **options)


def llama(name: str, student_width: int, teacher_width: int, **options: str) -> DistillationRace:
    """4 rows of 64 completion tokens, beside TRL, whose loss is the divergence alone and has no factor for T."""
    return DistillationRace(
        name, "trl", 32_000, student_width, teacher_width, alpha=1.0, temperature=1.0, target=NOT_WORSE, **options
    )


RACES = {
    race.name: race
    for race in (
        mt5_small("mt5_small_float32", 512),
        mt5_small("mt5_small_bfloat16", 512, dtype="bfloat16"),
        mt5_small("mt5_small_from_base_float32", 768),
        mt5_small("mt5_small_from_base_jsd_float32", 768, kind="jsd"),
        llama("llama_forward_kl_float32", 768, 768),
        llama("llama_reverse_kl_float32", 768, 768, kind="reverse_kl"),
        llama("llama_jsd_float32", 768, 768, kind="jsd"),
        llama("llama_from_wider_float32", 2048, 4096, kind="reverse_kl"),
        llama("llama_from_wider_bfloat16", 2048, 4096, kind="reverse_kl", dtype="bfloat16"),
    )
}


@dataclass(frozen=True)
class Inputs:
    """What both sides start from: hidden states, heads and targets."""

    student: torch.Tensor
    student_weight: torch.Tensor
    teacher: torch.Tensor
    teacher_weight: torch.Tensor
    targets: torch.Tensor


def full_logits(race: DistillationRace, inputs: Inputs) -> torch.Tensor:
    """Logits in the model's dtype, their float32 copies, torch's own losses."""
    with torch.no_grad():
        teacher = inputs.teacher @ inputs.teacher_weight.T
    student = inputs.student @ inputs.student_weight.T
    cross_entropy = functional.cross_entropy(student.float(), inputs.targets)
    divergence = divergence_of_full_logits(student, teacher, race.kind, race.temperature)
    return (1 - race.alpha) * cross_entropy + race.alpha * divergence


def trl(race: DistillationRace, inputs: Inputs) -> torch.Tensor:
    """TRL's loss on one long row."""
    hidden = inputs.student.unsqueeze(0), inputs.teacher.unsqueeze(0)
    heads = inputs.student_weight, inputs.teacher_weight
    return trl_divergence(*hidden, *heads, race.kind, race.temperature)


def left(race: DistillationRace, inputs: Inputs) -> torch.Tensor:
    """Ours."""
    result = linear_divergence(
        Head(inputs.student, inputs.student_weight),
        Head(inputs.teacher, inputs.teacher_weight),
        inputs.targets,
        divergence=Divergence(race.kind, temperature=race.temperature),
        alpha=race.alpha,
    )
    return result.loss_sum / result.tokens.n_tokens


LOSSES: Mapping[str, Callable[[DistillationRace, Inputs], torch.Tensor]] = {
    "full_logits": full_logits,
    "trl": trl,
    "left": left,
}


def inputs_of(race: DistillationRace) -> Inputs:
    """From a fixed seed, without temporary copies that would be memory to spare later."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, race.dtype)

    def normal(rows: int, width: int, deviation: float) -> torch.Tensor:
        return torch.empty(rows, width, dtype=dtype).normal_(std=deviation, generator=generator)

    widths = race.student_width, race.teacher_width
    student, teacher = (normal(race.rows, width, 1.0) for width in widths)
    weights = [normal(race.words, width, width**-0.5) for width in widths]
    targets = torch.randint(race.words, (race.rows,), generator=generator)
    return Inputs(student.requires_grad_(), weights[0], teacher, weights[1], targets)


def run_side(connection: Connection, race: DistillationRace, name: str) -> None:
    """Send a `Turn`, or the text of an error, whenever asked."""
    try:
        turns = take_turns(race, name)
        while connection.recv():
            connection.send(next(turns))
    except EOFError:
        return  # the race is over
    except Exception:
        connection.send(traceback.format_exc())


def take_turns(race: DistillationRace, name: str) -> Iterator[Turn]:
    """Every turn is the same steps; the first says what memory they took."""
    tiny_race = tiny(race)
    step(tiny_race, name, inputs_of(tiny_race))  # so that what is imported with it is no memory of the step
    inputs = inputs_of(race)
    counter = memory_counter(torch.device("cpu"))
    weights_bytes = counter.current()
    counter.reset_peak()
    turn = turn_of(race, name, inputs)
    turn.weights_bytes, turn.peak_bytes = weights_bytes, counter.peak()
    counter.close()  # its sampling thread would take time from the turns that count
    yield turn
    while True:
        yield turn_of(race, name, inputs)


def turn_of(race: DistillationRace, name: str, inputs: Inputs) -> Turn:
    """The median of some steps."""
    steps = [timed(lambda: step(race, name, inputs)) for _ in range(STEPS)]
    losses, norms = zip(*(values for _, values in steps), strict=True)
    return Turn(statistics.median(seconds for seconds, _ in steps), list(losses), list(norms))


def step(race: DistillationRace, name: str, inputs: Inputs) -> tuple[float, float]:
    """The loss, and the norm of its gradient."""
    loss = LOSSES[name](race, inputs)
    loss.backward()
    norm = float(inputs.student.grad.float().norm())
    inputs.student.grad = None
    return float(loss.detach()), norm


def tiny(race: DistillationRace) -> DistillationRace:
    """`race` at a toy size: shows that it runs and that the sides agree, and nothing about speed."""
    return replace(race, words=500, student_width=16, teacher_width=24, rows=12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--races", nargs="+", default=list(RACES), choices=list(RACES), metavar="NAME")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side that count")
    parser.add_argument("--tiny", action="store_true", help="a toy size: shows that the sides agree, not how fast")
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS}; none with --tiny")
    options = parser.parse_args()
    file = options.results or (None if options.tiny else RESULTS)
    common, records = environment(), []
    for name in options.races:
        race = tiny(RACES[name]) if options.tiny else RACES[name]
        record = {**asdict(race), "device": "cpu", "pairs": options.pairs, **common}
        try:
            record |= run_sides(
                race, [Side(name, run_side, race, name) for name in (race.rival, "left")], options.pairs
            )
        except RaceError as error:
            record |= {"status": error.status, "reason": str(error)}
        records.append(record)
        if file:
            write_records([record], file)
    print(markdown(records))
    print(f"\n{common['machine']}, {common['threads']} threads")
    if any(record["status"] != "run" for record in records):
        sys.exit(1)


if __name__ == "__main__":
    main()
