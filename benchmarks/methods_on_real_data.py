"""Does every method learn, at its defaults, on real models and real data?

    python benchmarks/methods_on_real_data.py --jobs 2

Every registered method trains for the same number of steps and rows on two small models that others pretrained, with
nothing set but what a method requires: a Llama on dialogue responses, and an encoder-decoder that writes Arabic names
in Latin letters. Each result is appended to a JSON lines file at once, and is not computed again on a restart, unless
the method's default learning rate has changed. `--table` prints the tables and `--write_docs` puts them into
docs/results.md.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cells import (
    ADAPTER_STEPS,
    N_ADAPTERS,
    N_TOKENS,
    RESULTS,
    SETTINGS,
    SHARED,
    Cell,
    find_record,
    finished_cells,
    make_trainer,
    required_options,
    run_cells,
)

from left_trainer import get_method, list_methods
from left_trainer.callbacks.trainable_parameters import count_parameters
from left_trainer.methods.learning_rates import NARROW
from left_trainer.models import FAMILIES
from left_trainer.runs.measurements import machine_name

DOCS = Path(__file__).parents[1] / "docs" / "results.md"
BEGIN, END = "<!-- methods_on_real_data.py: begin -->", "<!-- methods_on_real_data.py: end -->"
PACKAGES = ("torch", "transformers", "peft", "trl")
COLUMNS = "| method | trained | learning rate | loss before | loss after | {name} before | {name} after | seconds |"
ERROR_LENGTH = 200


@dataclass(frozen=True)
class Metric:
    """How a setting's generated text is judged: the metric to load, its score, what to call it, and which way is up."""

    metric: str
    score: str
    title: str
    larger_is_better: bool = True

    def is_better(self, after: float, before: float) -> bool:
        return after > before if self.larger_is_better else after < before


METRICS = {
    "stories260K": Metric("rouge", "rougeL", "ROUGE-L"),
    "aren-transliteration": Metric("chrf", "chrf", "chrF"),
}
TITLES = {
    "stories260K": "stories260K (decoder-only, 260,032 parameters), dialogue responses of taskmaster4",
    "aren-transliteration": "aren-transliteration (encoder-decoder, 205,952 parameters), Arabic names to Latin letters",
}


def train_and_score(setting: str, method: str, learning_rate: float, shared: Path, **budget: int) -> dict[str, Any]:
    """Loss in nats per target token and metric, before and after training, and what the training took."""
    chosen, metric = SETTINGS[setting], METRICS[setting]
    options = required_options(method, chosen, shared)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            chosen, shared, method, folder, **budget, metric=metric.metric, peft_kwargs=options or None
        )
        with trainer.without_adapter():
            before = trainer.evaluate()
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        after = trainer.evaluate()
        trainable = count_parameters(trainer.model).trainable
    score = f"eval_{metric.score}"
    return {
        "loss_before": before["eval_loss"],
        "loss_after": after["eval_loss"],
        "metric_before": before[score],
        "metric_after": after[score],
        "trainable_parameters": trainable,
        "seconds": round(seconds, 1),
        "environment": environment(),
    }


def environment() -> str:
    """Machine and versions."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"{machine_name()}; Python {platform.python_version()}, {versions}"


def markdown(cells: Sequence[Cell], records: Sequence[Cell], command: str) -> str:
    """The tables of every setting in `cells`; methods that do not beat the base model come first."""
    parts = [f"`{command}`: each method at its defaults, one run each. Loss in nats per target token.", ""]
    for setting in dict.fromkeys(cell["setting"] for cell in cells):
        rows = [r for cell in cells if cell["setting"] == setting and (r := find_record(cell, records))]
        scored = [row for row in rows if row.get("loss_after") is not None]
        failed = [row for row in rows if row.get("loss_after") is None]
        scored.sort(key=lambda row: row["loss_after"])
        beat = [row for row in scored if beats_base(row)]
        groups = {"Not better than the base model": [r for r in scored if r not in beat], "Better": beat}
        parts += [f"### {TITLES[setting]}", ""]
        for title, group in groups.items():
            if group:
                header = COLUMNS.format(name=METRICS[setting].title)
                parts += [f"{title} ({len(group)}):", "", header, "|---" * 8 + "|", *map(table_row, group), ""]
        if failed:
            parts += [f"Without a result ({len(failed)}):", ""]
            parts += [f"- `{row['method']}`: {reason(row)}" for row in failed] + [""]
    first = cells[0]
    parts += [
        f"{first['steps']} steps of {first['rows']} rows, {first['eval_rows']} validation rows, greedy decoding, seed "
        f"{first['seed']}. `xlora` mixes {N_ADAPTERS} LoRA adapters that were trained for {ADAPTER_STEPS} steps each, "
        f"`trainable_tokens` trains the {N_TOKENS} most frequent tokens of the targets, and `cpt` takes its context "
        "from the first training row."
    ]
    machines = dict.fromkeys(row["environment"] for row in records if "environment" in row)
    return "\n".join([*parts, *(f"On {machine}, one thread for each run." for machine in machines)]) + "\n"


def beats_base(row: Cell) -> bool:
    metric = METRICS[row["setting"]]
    return row["loss_after"] < row["loss_before"] and metric.is_better(row["metric_after"], row["metric_before"])


def table_row(row: Cell) -> str:
    losses = f"{row['loss_before']:.3f} | {row['loss_after']:.3f}"
    metrics = f"{row['metric_before']:.1f} | {row['metric_after']:.1f}"
    trained, rate = f"{row['trainable_parameters']:,}", f"{row['learning_rate']:g}"
    return f"| `{row['method']}` | {trained} | {rate} | {losses} | {metrics} | {row['seconds']:.0f} |"


def reason(row: Cell) -> str:
    if "error" not in row:
        return "the loss is not finite."
    return " ".join(row["error"].split())[:ERROR_LENGTH]


def write_docs(text: str) -> None:
    """Put `text` between the markers of docs/results.md. Raises `ValueError` where they are missing."""
    page = DOCS.read_text()
    if BEGIN not in page or END not in page:
        raise ValueError(f"{DOCS.name} has no lines {BEGIN!r} and {END!r}. Add them where the tables belong.")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    DOCS.write_text(f"{head}{BEGIN}\n\n{text}\n{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[method.name for method in list_methods()])
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--eval_rows", type=int, default=200, help="validation rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with the real models and data")
    parser.add_argument("--results", type=Path, default=RESULTS / "methods_on_real_data.jsonl")
    parser.add_argument("--restart", action="store_true", help="delete earlier results")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there, run nothing")
    parser.add_argument("--write_docs", action="store_true", help="put the tables into docs/results.md, run nothing")
    options = parser.parse_args()

    if options.restart:
        options.results.unlink(missing_ok=True)
    budget = {name: getattr(options, name) for name in ("steps", "rows", "eval_rows", "seed")}
    cells = [
        {"setting": setting, "method": method.name, "learning_rate": method.default_learning_rate(NARROW), **budget}
        for setting in METRICS
        for method in map(get_method, options.methods)
        if SETTINGS[setting].family in options.families and method.supports(SETTINGS[setting].family)
    ]
    if not (options.table or options.write_docs):
        run_cells(cells, train_and_score, options.shared, options.results, options.jobs)
    flags = " ".join(f"--{name} {value}" for name, value in budget.items() if value != parser.get_default(name))
    command = f"python benchmarks/methods_on_real_data.py {flags}".strip()
    text = markdown(cells, finished_cells(options.results), command)
    print(text)
    if options.write_docs:
        write_docs(text)


if __name__ == "__main__":
    main()
