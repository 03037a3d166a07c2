"""A made-up summary as the page gets it: six methods x four tasks, three seeds, and what users' files may hold."""

from __future__ import annotations

from random import Random
from typing import Any

SCRIPT = "</script><script>window.injected = true</script><img src=x onerror='window.injected = true'>"
ARABIC = "ولد ناقل الإيدز الليبي في بنغازي"
LONG_REASON = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n" + "and so on, " * 30
SEEDS = [42, 43, 44]
BASE_SPEED = 96.5
FAMILIES = {"soft_prompt": "soft prompts", "additive": "additive", "reparameterization": "reparameterization"}
# Family, trainable parameters, peak memory in MiB, steps per second, quality between 0 and 1.
METHODS: dict[str, tuple[str, int, float, float, float]] = {
    "prompt_tuning": ("soft_prompt", 5_120, 611.5, 16.1, 0.31),
    "p_tuning": ("soft_prompt", 54_656, 640.25, 15.2, 0.52),
    "prefix_tuning": ("soft_prompt", 15_360, 598.0, 17.9, 0.74),
    "ia3": ("additive", 3_840, 655.75, 15.9, 0.71),
    "bottleneck_adapter": ("additive", 32_760, 702.0, 14.8, 0.93),
    "lora": ("reparameterization", 1_036_864, 1_740.5, 13.6, 0.95),
}
TASKS = [
    ("summarization", "a document to a short summary", ["rougeL", "rouge1", "rouge2"]),
    ("translation", "a sentence to another language", ["chrf", "bleu"]),
    ("dialogue", "the turns so far to the next one", ["rougeL", "bleu", "distinct_1", "distinct_2"]),
    ("classification", "a text to a label word", ["accuracy", "macro_f1"]),
]
COLUMNS = [
    ("batch_size", "Batch size", "integer", None, "Examples in a training step."),
    ("total_parameters", "Total parameters", "integer", None, "Parameters of the model with the method applied."),
    ("trainable_parameters", "Trainable parameters", "integer", "lower", "Parameters that get a gradient."),
    ("trainable_percent", "Trainable", "percent", "lower", "Trainable as percent of total parameters."),
    ("adapter_bytes", "Adapter on disk", "bytes", "lower", "Size of the saved adapter."),
    ("peak_memory_train_bytes", "Peak memory, training", "bytes", "lower", "Highest memory while training."),
    ("peak_memory_generate_bytes", "Peak memory, generation", "bytes", "lower", "Highest memory while generating."),
    ("train_steps_per_second", "Training steps/s", "rate", "higher", "Optimizer steps, evaluation time left out."),
    ("target_tokens_per_second", "Target tokens/s", "rate", "higher", "Target tokens trained on."),
    ("generate_samples_per_second", "Generation samples/s", "rate", "higher", "Samples generated for."),
    ("learning_rate", "Learning rate", "learning_rate", None, "The learning rate used."),
    ("learning_rate_source", "Source of the rate", "text", None, "Where the learning rate comes from."),
    ("general_loss_before", "General loss before", "loss", None, "Loss on held-out general text before training."),
    ("general_loss_after", "General loss after", "loss", "lower", "The same after training: a rise is forgetting."),
]
FAILED = ("dialogue", "p_tuning")


def make_summary() -> dict[str, Any]:
    """The summary, the same at every call."""
    rng = Random(0)
    rows = []
    for task, _, metrics in TASKS:
        before = {name: round(rng.uniform(2, 24), 2) for name in metrics}
        rows.append(_base_row(task, before))
        rows += [_row(rng, task, method, before) for method in METHODS if (task, method) != FAILED]
    return {
        "title": "Six methods on four tasks",
        "model": "embedded/t5",
        "machines": ["AMD EPYC 7B13, 2 cores, no GPU; Python 3.11.2, torch 2.13.0, transformers 5.23.0, peft 0.21.2"],
        "command": "left-trainer compare --methods " + ",".join(METHODS) + " --seeds 3 --output_dir results/six",
        "run_seconds": 754.2,
        "seeds": SEEDS,
        "families": FAMILIES,
        "tasks": [
            {
                "name": name,
                "summary": text,
                "main_metric": metrics[0],
                "metrics": metrics,
                "lower_is_better": [],
                "settings": {"test rows": "100", "prompt": f"{name}: {{source}}", "beams": "1"},
            }
            for name, text, metrics in TASKS
        ],
        "columns": [dict(zip(("key", "title", "format", "better", "help"), column, strict=True)) for column in COLUMNS],
        "methods": ["base", *METHODS],
        "rows": rows,
        "failures": [
            {"task": FAILED[0], "method": FAILED[1], "seed": seed, "reason": f"{LONG_REASON} {SCRIPT}"}
            for seed in SEEDS[:2]
        ],
    }


def _base_row(task: str, before: dict[str, float]) -> dict[str, Any]:
    values = {key: None for key, *_ in COLUMNS}
    return {
        "id": f"{task}/base",
        "task": task,
        "method": "base",
        "family": "base",
        "seeds": [],
        "values": values | {"batch_size": 8, "total_parameters": 1_443_840, "generate_samples_per_second": BASE_SPEED},
        "metrics": {
            name: {"before": value, "mean": value, "low": None, "high": None, "interval": None}
            for name, value in before.items()
        },
        "curves": [],
        "samples": _samples(task, Random(1)),
        "predictions": [],
        "notes": "",
    }


def _row(rng: Random, task: str, method: str, before: dict[str, float]) -> dict[str, Any]:
    family, trainable, memory_mib, steps_per_second, quality = METHODS[method]
    metrics = {}
    for name, value in before.items():
        mean, half = min(99.0, 100 * quality * rng.uniform(0.9, 1.05)), rng.uniform(0.4, 3.5)
        high = min(100.0, mean + half)
        metrics[name] = {"before": value, "mean": mean, "low": mean - half, "high": high, "interval": "seeds"}
    total = 1_443_840 + trainable
    memory_bytes = int(memory_mib * rng.uniform(0.97, 1.1) * 2**20)
    return {
        "id": f"{task}/{method}",
        "task": task,
        "method": method,
        "family": family,
        "seeds": SEEDS,
        "values": {
            "batch_size": 8,
            "total_parameters": total,
            "trainable_parameters": trainable,
            "trainable_percent": 100 * trainable / total,
            "adapter_bytes": 4 * trainable + 1_312,
            "peak_memory_train_bytes": None if (task, method) == ("translation", "ia3") else memory_bytes,
            "peak_memory_generate_bytes": int(memory_bytes * 0.62),
            "train_steps_per_second": steps_per_second * rng.uniform(0.95, 1.05),
            "target_tokens_per_second": steps_per_second * rng.uniform(80, 110),
            # Merged, it is as fast as the base model, which even so is never the best.
            "generate_samples_per_second": BASE_SPEED if method == "ia3" else rng.uniform(60, 95),
            "learning_rate": {"soft_prompt": 1e-2, "additive": 0.1 * 0.05}.get(family, 0.1 + 0.2 - 0.2998),
            "learning_rate_source": "tuned" if method == "lora" else "default",
            "general_loss_before": 3.412,
            "general_loss_after": 3.412 + rng.uniform(-0.05, 0.9),
        },
        "metrics": metrics,
        "curves": [
            [
                [step, 0.05 + (1.6 - quality) * 2.2 / (1 + step / 60) + rng.uniform(0, 0.08)]
                for step in range(25, 501, 25)
            ]
            for _ in SEEDS
        ],
        "samples": _samples(task, rng),
        "predictions": [f"cells/{task}-{method}-seed{seed}/predictions.jsonl" for seed in SEEDS],
        "notes": "tuned: best of 3 learning rates on the validation split, 750 steps" if method == "lora" else "",
    }


def _samples(task: str, rng: Random) -> list[dict[str, str]]:
    names = rng.sample(["Alice", "Bob", "Carol", "Dora", "Emil", "Frida"], 2)
    report = f"{names[0]} called {names[1]} at nine. " + "They spoke about the train to the coast and the weather. " * 8
    return [
        {
            "source": report,
            "reference": f"{names[0]} called {names[1]} about the train.",
            "before": "the the and and of, of the",
            "after": f"{names[0]} called {names[1]} about the weather.",
        },
        {"source": ARABIC, "reference": "nAqlbnGAzy " + ARABIC, "before": "", "after": ARABIC},
        {"source": f"{task} {SCRIPT}", "reference": "a < b & c > d", "before": SCRIPT, "after": "a < b & c"},
    ]
