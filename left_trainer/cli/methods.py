"""`left-trainer methods`: list the fine-tuning methods."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

DESCRIPTION = "List the fine-tuning methods: what --peft_method and LeftTrainingArguments(peft_method=...) accept."


def main(argv: list[str]) -> int:
    """Print the registry of methods."""
    parser = argparse.ArgumentParser(prog="left-trainer methods", description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print records as JSON")
    options = parser.parse_args(argv)

    from left_trainer.callbacks.tables import format_table
    from left_trainer.methods import list_methods

    records = [_record(method) for method in sorted(list_methods(), key=lambda method: (method.family, method.name))]
    if options.json:
        print(json.dumps(records, indent=2))
        return 0
    rows = [
        (record["name"], record["family"], f"{record['learning_rate']:g}", record["summary"], record["paper"])
        for record in records
    ]
    print(format_table("Methods", ("name", "family", "learning rate", "what is trained", "paper"), rows))
    return 0


def _record(method: Any) -> dict[str, Any]:
    """The record's data; what it computes from a model is left out."""
    return {name: value for name, value in asdict(method).items() if not callable(value)}
