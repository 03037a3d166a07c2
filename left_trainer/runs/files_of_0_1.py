"""What version 0.1 wrote as a sentence and later versions write as fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from left_trainer.runs.json_records import to_json
from left_trainer.runs.tuning import Trial, TuningResult

SCALED_DEFAULT = re.compile(r"[\d.e+-]+ x default \(embedded model\)")
TUNED = re.compile(
    r"tuned: best of (?P<n_trials>\d+) by (?P<metric>\S+) on the validation split \((?P<trials>.*)\), "
    r"(?P<steps>\d+) steps, (?P<seconds>\d+) s of training"
)


def upgrade_learning_rate_source(content: Mapping[str, Any]) -> dict[str, Any]:
    """A report's JSON values, with `learning_rate_source` of 0.1 as the fields that took its place.

    Values that version 0.1 did not write stay as they are.
    """
    source = str(content.get("learning_rate_source"))
    fields: dict[str, Any] = {}
    if SCALED_DEFAULT.fullmatch(source):
        fields = {"learning_rate_source": "default"}
    elif tuning := upgrade_tuning(source):
        fields = {"learning_rate_source": "tuned", "tuning": to_json(tuning)}
    return {**content, **fields}


def upgrade_tuning(text: Any) -> TuningResult | None:
    """The tuning that a sentence of 0.1 describes; `None` for anything else."""
    tuned = TUNED.fullmatch(str(text))
    if tuned is None:
        return None
    trials = [trial.split(": ") for trial in tuned["trials"].split(", ")]
    return TuningResult(
        metric=tuned["metric"],
        n_trials=int(tuned["n_trials"]),
        trials=tuple(Trial(float(rate), float(score)) for rate, score in trials),
        train_steps=int(tuned["steps"]),
        train_seconds=float(tuned["seconds"]),
    )
