"""How long does a run take to its first step, and what of it is LeftTrainer's?

    python benchmarks/start.py
    python benchmarks/start.py --families decoder_only --pairs 7

Three sides take turns, each in a process of its own: the imports of the plain stack alone, a script of that stack that
tokenizes the rows and builds its trainer, and `left-trainer train` on the same rows and embedded model. Scoring the
untrained model, which `left-trainer train` does before the first step, is counted apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FAMILIES = ("encoder_decoder", "decoder_only")
WANTED_SECONDS = 0.5
RESULTS = Path(__file__).parent / "results" / "start.json"
MAX_LENGTH = 256


class FirstStepReached(Exception):  # noqa: N818
    """Ends a side."""


def seconds_since_start() -> float:
    """Of this process."""
    import psutil

    return time.time() - psutil.Process().create_time()


def import_stack() -> None:
    """What a script with either trainer and an adapter imports."""
    import datasets  # noqa: F401
    import torch  # noqa: F401
    from peft import LoraConfig, get_peft_model  # noqa: F401
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainer  # noqa: F401
    from trl import SFTTrainer  # noqa: F401


def run_plain(family: str, model: str, file: str, output_dir: str) -> dict[str, float]:
    """To the first step of the plain stack."""
    import_stack()
    imported = seconds_since_start()
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        Trainer,
    )
    from trl import SFTConfig, SFTTrainer

    stop_at(Trainer)
    rows = load_dataset("json", data_files=file, split="train", cache_dir=output_dir)
    tokenizer = AutoTokenizer.from_pretrained(model)
    common = {"output_dir": output_dir, "report_to": "none", "per_device_train_batch_size": 16, "disable_tqdm": True}
    if family == "encoder_decoder":
        seq2seq = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(model), LoraConfig(target_modules=["q", "v"]))
        columns = rows.column_names
        tokens = rows.map(
            lambda batch: tokenizer(
                batch["document"], text_target=batch["summary"], max_length=MAX_LENGTH, truncation=True
            ),
            batched=True,
            remove_columns=columns,
        )
        collator = DataCollatorForSeq2Seq(tokenizer, seq2seq)
        arguments = Seq2SeqTrainingArguments(**common)
        trainer = Seq2SeqTrainer(seq2seq, arguments, train_dataset=tokens, data_collator=collator)
    else:
        causal = AutoModelForCausalLM.from_pretrained(model)
        rows = rows.rename_columns({"document": "prompt", "summary": "completion"})
        config = SFTConfig(**common, max_length=MAX_LENGTH, gradient_checkpointing=False, bf16=False)
        lora = LoraConfig(target_modules=["q_proj", "v_proj"])
        trainer = SFTTrainer(causal, config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    return to_first_step(trainer.train) | {"imports": imported}


def run_ours(family: str, model: str, file: str, output_dir: str) -> dict[str, float]:
    """To the first step of `left-trainer train`."""
    from left_trainer.cli.main import main
    from left_trainer.imports import import_stack

    import_stack()  # as the command does
    from left_trainer.runs import fine_tuning

    imported = seconds_since_start()
    scoring = 0.0
    score = fine_tuning.score

    def timed(*arguments: object) -> object:
        nonlocal scoring
        began = time.perf_counter()
        result = score(*arguments)  # type: ignore[arg-type]
        scoring += time.perf_counter() - began
        return result

    fine_tuning.score = timed  # type: ignore[assignment]
    stop_at(fine_tuning.LeftTrainer)
    words = ["train", "--task", "summarization", "--model_name_or_path", model, "--train_file", file]
    words += ["--output_dir", output_dir, "--max_length", str(MAX_LENGTH), "--max_eval_samples", "50"]
    found = to_first_step(lambda: main(words))
    return {**found, "imports": imported, "scoring": scoring, "first_step": found["first_step"] - scoring}


def stop_at(trainer: type) -> None:
    """Have the first step of a trainer end the run."""

    def training_step(*arguments: object, **options: object) -> None:
        raise FirstStepReached

    trainer.training_step = training_step  # type: ignore[attr-defined]


def to_first_step(train: object) -> dict[str, float]:
    """The seconds since the start of the process when the first step begins."""
    try:
        train()  # type: ignore[operator]
    except FirstStepReached:
        return {"first_step": seconds_since_start()}
    raise SystemExit("the run has ended without a step")


def run_imports(*_: str) -> dict[str, float]:
    """The imports alone."""
    import_stack()
    return {"imports": seconds_since_start()}


SIDES = {"imports": run_imports, "plain": run_plain, "left_trainer": run_ours}


def turn(side: str, family: str, model: str, file: Path, folder: Path) -> dict[str, float]:
    """One turn of a side in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as output_dir:
        words = [sys.executable, __file__, "--side", side, family, model, str(file), str(Path(output_dir) / "run")]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(Path(output_dir) / "cache")}
        result = subprocess.run(words, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side that count")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--side", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side, *arguments = options.side
        print(json.dumps(SIDES[side](*arguments)), flush=True)
        os._exit(0)
    from left_trainer.data.loading import embedded_data
    from left_trainer.embedded import MODEL_PATHS
    from left_trainer.runs.measurements import machine_name
    from left_trainer.tasks import get_task

    records = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        embedded_data(get_task("summarization"))["train"].select(range(options.rows)).to_json(file)
        for family in options.families:
            model = str(MODEL_PATHS[family])
            turns = [
                {side: turn(side, family, model, file, Path(folder)) for side in SIDES}
                for _ in range(options.pairs + 1)
            ][1:]  # the first is a warm-up
            seconds = {
                "imports of the stack": [each["imports"]["imports"] for each in turns],
                "plain stack to the first step": [each["plain"]["first_step"] for each in turns],
                "left-trainer train to the first step": [each["left_trainer"]["first_step"] for each in turns],
                "scoring before it": [each["left_trainer"]["scoring"] for each in turns],
            }
            for name, values in seconds.items():
                print(f"{family}: {name}: {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})")
            more = [each["left_trainer"]["first_step"] - each["plain"]["first_step"] for each in turns]
            reached = "reached" if statistics.median(more) <= WANTED_SECONDS else "missed"
            print(
                f"{family}: more than the plain stack: {statistics.median(more):.2f} s ({min(more):.2f} to "
                f"{max(more):.2f}); at most {WANTED_SECONDS} wanted: {reached}",
                flush=True,
            )
            records[family] = {"seconds": seconds, "more": more, "wanted": WANTED_SECONDS}
    content = {"families": records, "rows": options.rows, "machine": machine_name()}
    options.results.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
