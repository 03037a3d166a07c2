"""What it costs to get from a file to the first step: CPU seconds of each phase, and memory.

    python benchmarks/data_loading.py --rows 2000000

Rows are generated into a temporary folder, where the caches lie too, and each family of models reads them in a process
of its own: once anew, once from the cache, and once streamed. CPU seconds are those of all threads and child processes,
so that a busy machine changes them little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

MODELS = ("embedded/t5", "embedded/llama")
RUNS = ("anew", "cached", "streamed")
WORDS = ["good", "bad", "long", "short", "funny", "sad", "clever", "dull", "warm", "cold", "strange", "plain"]
TASK = "classification"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="rows of the file (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=MODELS, help="models to read for (default: %(default)s)")
    parser.add_argument("--runs", nargs="+", default=RUNS, choices=RUNS, help="what to measure (default: all)")
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "RUN", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    print(f"{options.rows:,} rows, {processor()}, {os.cpu_count()} cores")
    print("| model | run | rows, prompts | tokens | first step | all, CPU s | memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder), options.rows)
            for run in options.runs:
                figures = run_alone(model, run, folder)
                phases = [figures[phase] for phase in ("prompts", "tokens", "first step")]
                cells = [f"{seconds:.1f}" for seconds in (*phases, sum(phases))]
                print(f"| {model} | {run} | {' | '.join(cells)} | {figures['MiB']:.0f} |", flush=True)


def write_rows(folder: Path, n_rows: int) -> None:
    """`n_rows` short rows for training, and a few for validation."""
    rng = random.Random(0)
    for name, count in (("train", n_rows), ("validation", 100)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                text = f"The film {number} was {' and '.join(rng.choices(WORDS, k=rng.randint(1, 5)))}."
                file.write(json.dumps({"text": text, "label": rng.choice(("positive", "negative"))}) + "\n")


def run_alone(model: str, run: str, folder: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", model, run, folder]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(folder))
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def environment(folder: str) -> dict[str, str]:
    return {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}


def measure(model: str, run: str, folder: str) -> dict[str, float]:
    """CPU seconds of each phase of a run, and MiB that it takes beyond the model: its own, without mapped files."""
    from transformers import TrainerCallback

    from left_trainer import (
        DataArguments,
        LeftTrainer,
        LeftTrainingArguments,
        get_task,
        load_tokenizer,
        prepare_task_data,
    )
    from left_trainer.embedded import MODEL_NAMES

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    files = {name: f"{folder}/{name}.jsonl" for name in ("train", "validation")}
    streaming = {"streaming": True} if run == "streamed" else {}
    data = DataArguments(train_file=files["train"], validation_file=files["validation"], **streaming)
    args = LeftTrainingArguments(
        f"{folder}/out", use_cpu=True, report_to="none", save_strategy="no", max_steps=10, disable_tqdm=True
    )
    path = str(MODEL_NAMES[model])
    tokenizer = load_tokenizer(path)
    figures, before, peak = {}, cpu_seconds(), PeakMemory()
    rows = prepare_task_data(get_task(TASK), data, path, tokenizer, args)
    figures["prompts"], before = cpu_seconds() - before, cpu_seconds()
    trainer = LeftTrainer(
        path,
        args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        callbacks=[Stop()],
    )
    figures["tokens"], before = cpu_seconds() - before, cpu_seconds()
    trainer.train()
    return {**figures, "first step": cpu_seconds() - before, "MiB": peak.stop()}


class PeakMemory:
    """MiB of memory of its own that the process takes from now on, at most; looked at every tenth of a second."""

    def __init__(self) -> None:
        self.start = self.peak = own_mib()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stopped.wait(0.1):
            self.peak = max(self.peak, own_mib())

    def stop(self) -> float:
        self.stopped.set()
        self.thread.join()
        return self.peak - self.start


def own_mib() -> float:
    return int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def processor() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
