"""What races leave: records in a JSON file, and tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def write_records(records: Sequence[Record], file: Path) -> None:
    """Put `records` into `file`, in the place of earlier ones of the same races on the same machine.

    A ratio is a property of the machine. What was not run is kept only where no machine has run it.
    """
    earlier = json.loads(file.read_text()) if file.exists() else []
    found = {(record["name"], record["machine"]): record for record in [*earlier, *records]}
    were_run = {name for (name, _), record in found.items() if record["status"] != "not run"}
    kept = [record for (name, _), record in found.items() if record["status"] != "not run" or name not in were_run]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=1) + "\n")


def markdown(records: Sequence[Record]) -> str:
    """The races as a table; after it, those that have published figures beside them, and what stopped the others."""
    lines = [
        "| race | against | times as fast, median [min, max] | wanted | memory above the weights | wanted | "
        "loss, rival | loss, ours | reached |",
        "|---|---|---|---|---|---|---|---|---|",
        *(line_of(record) for record in records),
    ]
    published = [record for record in records if record["status"] == "run" and record["published"]]
    if published:
        lines += [
            "",
            "| race | it/s, ours | it/s, rival | it/s, published | peak MiB, ours | peak MiB, rival | published |",
            "|---|---|---|---|---|---|---|",
            *(published_line(record) for record in published),
        ]
    for record in records:
        if record["status"] in ("refused", "failed"):
            lines += ["", f"{record['name']}: {record['reason']}"]
    return "\n".join(lines)


def line_of(record: Record) -> str:
    """A row of the table."""
    name, rival, target = record["name"], record["rival"], record["target"] or {}
    wanted_speed = f">= {target['speed']:.3g}" if target else "-"
    wanted_memory = f"<= {target['memory']:.3g}" if target.get("memory") else "-"
    if record["status"] != "run":
        outcome = record["status"] + (f": {record['reason']}" if record["status"] == "not run" else "")
        return f"| {name} | {rival} | {outcome} | {wanted_speed} | | {wanted_memory} | | | |"
    speed, reached = record["speed"], record["reached"]
    memory = "-" if record["memory"] is None else f"{record['memory']:.2f}"
    verdict = ", ".join(f"{kind} {'yes' if is_reached else 'NO'}" for kind, is_reached in reached.items()) or "-"
    losses = [losses_text(record["sides"][side]["losses"]) for side in ("rival", "ours")]
    figures = f"{speed['median']:.2f} [{speed['min']:.2f}, {speed['max']:.2f}]"
    cells = (name, rival, figures, wanted_speed, memory, wanted_memory, *losses, verdict)
    return f"| {' | '.join(cells)} |"


def losses_text(losses: Sequence[float]) -> str:
    """The first and the last of several."""
    return " to ".join(f"{loss:.5f}" for loss in dict.fromkeys((losses[0], losses[-1])))


def published_line(record: Record) -> str:
    """A row of the table of published figures."""
    sides, published = record["sides"], record["published"]
    rates = [1 / statistics.median(sides[name]["seconds"]) for name in ("ours", "rival")]
    peaks = [sides[name]["peak_bytes"] / 2**20 for name in ("ours", "rival")]
    figures = (*rates, published["steps_per_second"], *peaks, published["peak_mib"])
    cells = [f"{figure:.2f}" for figure in figures[:3]] + [f"{figure:.0f}" for figure in figures[3:]]
    return f"| {record['name']} | {' | '.join(cells)} |"
