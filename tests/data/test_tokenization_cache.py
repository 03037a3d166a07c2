"""What is tokenized once is not tokenized again: not by a second run, nor by the second process of one run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from processes import ENVIRONMENT
from tiny import tiny_rows

SCRIPT = """
import json
import sys
import time

from tiny import FAMILY_TYPES, tiny_model, tiny_tokenizer
from datasets import load_dataset
from transformers import PreTrainedTokenizerBase

from left_trainer import LeftTrainer, LeftTrainingArguments

folder, name = sys.argv[1:]
counts = dict.fromkeys(FAMILY_TYPES, 0)
call = PreTrainedTokenizerBase.__call__


def counting_call(self, text=None, *args, text_target=None, **kwargs):
    texts = text if text_target is None else text_target
    counts[family] += len(texts) if isinstance(texts, list) else 1
    time.sleep(0.5 if isinstance(texts, list) else 0)  # else one process might be done before the other begins
    return call(self, text, *args, text_target=text_target, **kwargs)


PreTrainedTokenizerBase.__call__ = counting_call
rows = load_dataset("json", data_files=folder + "/rows.jsonl", split="train", cache_dir=folder + "/cache")
args = LeftTrainingArguments(output_dir=folder + "/run", report_to="none", use_cpu=True)
for family, model_type in FAMILY_TYPES.items():
    args.distributed_state.wait_for_everyone()
    LeftTrainer(tiny_model(model_type), args, train_dataset=rows, processing_class=tiny_tokenizer(family))
with open(f"{folder}/{name}-{args.process_index}.json", "w") as file:
    json.dump(counts, file)
"""
N_ROWS = 40


def tokenized_texts(folder: Path, name: str, processes: int) -> list[dict[str, int]]:
    """How many texts each process tokenized, by the model's family."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes > 1 else []
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *launch, str(script), str(folder), name]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(processes)]


def test_rows_of_a_file_are_tokenized_once(tmp_path):
    rows = [json.dumps({**row, "prompt": f"{number} {row['prompt']}"}) for number, row in enumerate(tiny_rows(N_ROWS))]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    first, second = tokenized_texts(tmp_path, "first", processes=2)
    (again,) = tokenized_texts(tmp_path, "again", processes=1)
    assert min(first.values()) >= 2 * N_ROWS
    assert max(*second.values(), *again.values()) < N_ROWS
