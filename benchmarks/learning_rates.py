"""Where the default learning rates for narrow models come from: a sweep around each method's default.

    python benchmarks/learning_rates.py --jobs 2

Every method is trained on each model with a grid of rates, and the validation loss at the end is printed, the best of
each row marked. Each result is appended to a JSON lines file in benchmarks/results/ at once, and is not computed again
when the script is restarted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from cells import RESULTS, SETTINGS, SHARED, find_record, finished_cells, make_trainer, required_options, run_cells

from left_trainer import get_method, list_methods
from left_trainer.callbacks.tables import format_table
from left_trainer.methods.learning_rates import NARROW

FACTORS = (0.3, 1.0, 3.0, 10.0)
EMBEDDED = ("embedded/t5", "embedded/llama")


def validation_loss(setting: str, method: str, learning_rate: float, shared: Path, **budget: int) -> dict[str, Any]:
    """Validation loss, in nats per target token, at the end of training."""
    chosen, started = SETTINGS[setting], time.perf_counter()
    options = required_options(method, chosen, shared)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            chosen, shared, method, folder, **budget, learning_rate=learning_rate, peft_kwargs=options
        )
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    return {"validation_loss": loss, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[method.name for method in list_methods()])
    parser.add_argument("--settings", nargs="+", default=EMBEDDED, choices=list(SETTINGS))
    parser.add_argument("--factors", nargs="+", type=float, default=FACTORS, help="times the method's default rate")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--eval_rows", type=int, default=100, help="validation rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with the real models and data")
    parser.add_argument("--results", type=Path, default=RESULTS / "learning_rates.jsonl")
    parser.add_argument("--restart", action="store_true", help="delete earlier results")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    options = parser.parse_args()

    if options.restart:
        options.results.unlink(missing_ok=True)
    methods = [get_method(name) for name in options.methods]
    cells = [
        {
            "setting": setting,
            "method": method.name,
            "learning_rate": float(f"{method.default_learning_rate(NARROW) * factor:.3g}"),
            "steps": options.steps,
            "rows": options.rows,
            "eval_rows": options.eval_rows,
            "seed": options.seed,
        }
        for factor in options.factors
        for method in methods
        for setting in options.settings
        if method.supports(SETTINGS[setting].family)
    ]
    if not options.table:
        run_cells(cells, validation_loss, options.shared, options.results, options.jobs)

    records = finished_cells(options.results)
    for setting in options.settings:
        rows = []
        for method in methods:
            wanted = [cell for cell in cells if (cell["setting"], cell["method"]) == (setting, method.name)]
            wanted.sort(key=lambda cell: cell["learning_rate"])
            losses = [(find_record(cell, records) or {}).get("validation_loss") for cell in wanted]
            best = min((loss for loss in losses if loss is not None), default=None)
            shown = ["-" if loss is None else f"{loss:.3f}{'*' if loss == best else ''}" for loss in losses]
            if shown:
                rows.append((method.name, f"{method.default_learning_rate(NARROW):g}", *shown))
        header = ("method", "default", *(f"x {factor:g}" for factor in sorted(options.factors)))
        print("\n" + format_table(f"Validation loss after {options.steps} steps, {setting}", header, rows))


if __name__ == "__main__":
    main()
