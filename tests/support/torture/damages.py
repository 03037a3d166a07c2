"""Damaged checkpoints: resume takes the newest whole one and says what it skipped, or refuses; never loads half."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from left_trainer.storage.locks import LOCK_FILE
from torture.case import Case
from torture.kills import _differ, _start, _training, _whole_run

FAMILY = "decoder_only"
SKIPPED = "resume goes on from the checkpoint before, names the damaged one, and ends as an undisturbed run"
OPENED = "as one of 0.1 it is opened, found whole and gone on from by its name, and the run ends as an undisturbed one"
WEIGHTS = {"lora": "adapter_model.safetensors", "p_tuning": "adapter_model.safetensors", "full": "model.safetensors"}
FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "checkpoint_manifest.json")
SIDECAR = "adapter_training_state.safetensors"
NEWEST, BEFORE = "checkpoint-4", "checkpoint-2"
_lock = threading.Lock()
Damage = Callable[[Path], None]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    """One bit in the middle: the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def _zero(path: Path) -> None:
    """What a file system may leave after a power loss: the size, and zeros."""
    path.write_bytes(bytes(path.stat().st_size))


def _remove(path: Path) -> None:
    path.unlink()


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n{}")


DAMAGES: dict[str, Damage] = {
    "truncated": _truncate,
    "empty": _empty,
    "a bit flipped": _flip,
    "zeros": _zero,
    "removed": _remove,
    "longer": _append,
}


def cases() -> Iterator[Case]:
    for method, weights in WEIGHTS.items():
        for name in (weights, *FILES) if method == "lora" else (weights, "optimizer.pt"):
            for damage in DAMAGES:
                expected = OPENED if (name, damage) == (FILES[-1], "removed") else SKIPPED
                yield _case(f"{method} {name} {damage}", expected, _damaged(method, name, DAMAGES[damage]))
    yield _case(
        "p_tuning sidecar removed", SKIPPED, _damaged("p_tuning", "adapter_training_state.safetensors", _remove)
    )
    yield _case("p_tuning sidecar flipped", SKIPPED, _damaged("p_tuning", "adapter_training_state.safetensors", _flip))
    yield _case("lora adapter_config.json emptied", SKIPPED, _damaged("lora", "adapter_config.json", _empty))
    yield _case("lora adapter_config.json flipped", SKIPPED, _damaged("lora", "adapter_config.json", _flip))
    yield _case("lora weights of another shape", SKIPPED, _damaged("lora", WEIGHTS["lora"], _other_shape))
    yield _case("lora optimizer of the checkpoint before", SKIPPED, _damaged("lora", "optimizer.pt", _from_before))
    yield _case("lora weights of the checkpoint before", SKIPPED, _damaged("lora", WEIGHTS["lora"], _from_before))
    both = "a run starts from the beginning, names both, and ends as an undisturbed run"
    yield _case("lora both checkpoints truncated", both, _all_damaged)
    for field, value in OTHER_RUNS.items():
        expected = f"refused before anything is loaded, with {field} and both values; the checkpoints stay"
        yield _case(f"resume with another {field}", expected, _other_run(field, value))
    kept = "only checkpoint-<number> folders are ours: what else is there stays as it is, and the run ends as usual"
    yield _case("folders and links with similar names", kept, _similar_names)


def _case(name: str, expected: str, check: Callable[[Path], None], quick: bool = False) -> Case:
    return Case("damages", name, expected, check, quick)


OTHER_RUNS: dict[str, dict[str, Any]] = {
    "peft_method": {"method": "lora_plus"},
    "peft_kwargs": {"arguments": {"peft_kwargs": {"r": 2}}},
    "target_modules": {"arguments": {"peft_kwargs": {"target_modules": ["k_proj"]}}},
    "per_device_train_batch_size": {"arguments": {"per_device_train_batch_size": 2}},
    "seed": {"arguments": {"seed": 4}},
}


def _damaged(method: str, name: str, damage: Damage) -> Callable[[Path], None]:
    """One file of the newest checkpoint damaged."""

    def check(folder: Path) -> None:
        options = _interrupted(folder, method)
        newest = Path(options["folder"]) / "run" / NEWEST
        damage(newest / name)
        text = _assert_ends_as_usual(options, method)
        assert NEWEST in text, f"{NEWEST} is not named: {text}"

    return check


def _all_damaged(folder: Path) -> None:
    options = _interrupted(folder, "lora")
    for name in (NEWEST, BEFORE):
        _truncate(Path(options["folder"]) / "run" / name / WEIGHTS["lora"])
    text = _assert_ends_as_usual(options, "lora")
    assert NEWEST in text, text
    assert BEFORE in text, text


def _other_run(field: str, change: dict[str, Any]) -> Callable[[Path], None]:
    """Resumed by a script in which something else is trained."""

    def check(folder: Path) -> None:
        options = _interrupted(folder, "lora")
        run = Path(options["folder"]) / "run"
        # The lock of the killed run goes with the next one.
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK_FILE}
        status, text = _start({**options, **change})
        assert status not in (0, -11), f"exit {status}: {text}"
        assert field in text, text
        assert {path: path.read_bytes() for path in before} == before, "a file of the earlier run has changed"

    return check


def _similar_names(folder: Path) -> None:
    options = _interrupted(folder, "lora")
    run = Path(options["folder"]) / "run"
    (run / "checkpoint-best-keep").mkdir()
    (run / "checkpoint-best-keep" / "model.bin").write_text("mine")
    (run / "checkpoint-notes.txt").write_text("mine")
    (run / "checkpoint-00").symlink_to(folder)
    (run / "checkpoint-9x").mkdir()
    _assert_ends_as_usual(options, "lora")
    assert (run / "checkpoint-best-keep" / "model.bin").read_text() == "mine"
    assert (run / "checkpoint-notes.txt").read_text() == "mine"
    assert (run / "checkpoint-00").is_symlink()
    assert (run / "checkpoint-9x").is_dir()


def _other_shape(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: torch.zeros(*tensor.shape, 1) for name, tensor in tensors.items()}, path)


def _from_before(path: Path) -> None:
    shutil.copyfile(path.parents[1] / BEFORE / path.name, path)


def _assert_ends_as_usual(options: dict[str, Any], method: str) -> str:
    """What the resumed run printed."""
    status, text = _start(options)
    assert status == 0, f"exit {status}: {text}"
    result, whole = json.loads(Path(options["result"]).read_text()), _whole_run(method, FAMILY, 1)
    assert _differ(result["losses"], whole["losses"]) is None, f"losses {result['losses']}, not {whole['losses']}"
    assert _differ(list(result["weights"].values()), list(whole["weights"].values())) is None, "weights differ"
    return text


def _interrupted(folder: Path, method: str) -> dict[str, Any]:
    """The options of a run that was killed after step 5: it has checkpoints of steps 2 and 4."""
    options = _training(folder, method, FAMILY)
    with _lock:
        source = _interrupted_run(method)
    shutil.copytree(source, Path(options["folder"]) / "run")
    return options


@functools.cache
def _interrupted_run(method: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="torture-interrupted-"))
    options = _training(folder, method, FAMILY)
    status, text = _start({**options, "signal_at_step": 5, "signal": "SIGKILL"})
    assert status in (-9, 137), f"exit {status}: {text}"
    return folder / "work" / "run"
