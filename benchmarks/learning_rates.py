"""Where the default learning rates of the methods come from: a sweep on the embedded models.

    python benchmarks/learning_rates.py

Every method is trained on the embedded summarization data with each rate of a grid, on both model families, and the
validation loss at the end is printed, the best of each row marked. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from left_trainer import (
    DataArguments,
    LeftTrainer,
    LeftTrainingArguments,
    get_task,
    list_methods,
    load_tokenizer,
    prepare_task_data,
)
from left_trainer.callbacks.tables import format_table
from left_trainer.embedded import MODEL_PATHS

FACTORS = (0.3, 1.0, 3.0, 10.0)
RESULTS = Path(__file__).parent / "results"


def validation_loss(method: str, family: str, learning_rate: float, steps: int, seed: int) -> float:
    """Validation loss, in nats per target token, after `steps` steps of 16 rows."""
    task, model = get_task("summarization"), str(MODEL_PATHS[family])
    with tempfile.TemporaryDirectory() as folder:
        args = LeftTrainingArguments(
            output_dir=folder,
            peft_method=method,
            learning_rate=learning_rate,
            max_steps=steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=50,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        )
        tokenizer = load_tokenizer(model, args)
        data = prepare_task_data(task, DataArguments(), model, tokenizer, args)
        trainer = LeftTrainer(
            model, args, train_dataset=data["train"], eval_dataset=data["validation"], processing_class=tokenizer
        )
        trainer.train()
        return trainer.evaluate()["eval_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[method.name for method in list_methods()])
    parser.add_argument("--families", nargs="+", default=list(MODEL_PATHS), choices=list(MODEL_PATHS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    disable_progress_bar()
    results = []
    methods = [method for method in list_methods() if method.name in options.methods]
    cells = [(method, family, factor) for family in options.families for method in methods for factor in FACTORS]
    for method, family, factor in tqdm(cells, desc="runs"):
        rate = method.learning_rate * factor
        loss = validation_loss(method.name, family, rate, options.steps, options.seed)
        results.append({"family": family, "method": method.name, "learning_rate": rate, "validation_loss": loss})
    RESULTS.mkdir(exist_ok=True)
    for family in options.families:
        record = {"steps": options.steps, "seed": options.seed, "runs": [r for r in results if r["family"] == family]}
        (RESULTS / f"learning_rates_{family}.json").write_text(json.dumps(record, indent=1) + "\n")

    for family in options.families:
        rows = []
        for method in methods:
            runs = [run for run in results if (run["family"], run["method"]) == (family, method.name)]
            losses = [run["validation_loss"] for run in runs]
            shown = [f"{loss:.3f}{'*' if loss == min(losses) else ''}" for loss in losses]
            rows.append((method.name, f"{method.learning_rate:g}", *shown))
        header = ("method", "default", *(f"x {factor:g}" for factor in FACTORS))
        print("\n" + format_table(f"Validation loss after {options.steps} steps, {family}", header, rows))


if __name__ == "__main__":
    main()
