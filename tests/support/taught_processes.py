"""Students and their teacher in one or more processes; started by test_taught_processes.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from left_trainer.trainer import on_policy
from log_history import gradient_norms, losses
from taught import taught
from tiny import tiny_rows

# Where nothing is drawn, what the student writes is the same in any number of processes.
GREEDY = {"do_sample": False, "num_beams": 1}


def results(folder: Path, processes: int) -> dict[str, Any]:
    """Losses and gradient norms of students that learn from kept answers, and from their own texts."""
    on_policy.SAMPLING = GREEDY
    arguments = {
        "max_steps": 2,
        "max_grad_norm": 1e9,
        "per_device_train_batch_size": 8 // processes,
        "per_device_eval_batch_size": 3,
    }
    rows = Dataset.from_list(tiny_rows(12))  # of the second step, half fills up the batches of two processes
    found = {}
    for family in ("encoder_decoder", "decoder_only"):
        given: dict[str, Any] = {"rows": rows, "arguments": arguments}
        kept = taught(folder / family, family, sequence_level=True, cache_teacher=8, alpha=0.5, **given)
        own = taught(folder / f"own-{family}", family, on_policy_fraction=1.0, **given)
        for name, trainer in (("kept", kept), ("own", own)):
            trainer.train()
            found[f"{family}, {name}"] = [losses(trainer), gradient_norms(trainer)]
    return found


if __name__ == "__main__":
    output, processes = Path(sys.argv[1]), int(sys.argv[2])
    found = results(output.parent, processes)
    from accelerate import PartialState

    if PartialState().is_main_process:
        output.write_text(json.dumps(found))
