"""Pickles and code in every file that a user may receive: nothing is executed.

Each case plants a payload that would make the file `executed` in the case's folder, and gives it to a command.
"""

from __future__ import annotations

import functools
import json
import pickle
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from left_trainer.storage.manifest import MANIFEST_FILE
from processes import ENVIRONMENT
from tiny import tiny_model, tiny_rows, tiny_tokenizer
from torture.case import Case, python

KIND = "code"
SECONDS = 180
MARKER = "executed"
REFUSED, IGNORED = "refused in one paragraph", "ignored"
QUICK = {"adapter_model.bin-generate", "auto_map of the base-train", "optimizer.pt-resume", "yaml tag-compare"}
_lock = threading.Lock()


@dataclass(frozen=True)
class Payload:
    """A file that would run code when it is read as what it looks like.

    Args:
        name: Of the case, with the command.
        commands: Names of `COMMANDS`.
        plant: Puts it into the case's folder: `model`, `run` and `rows.jsonl` are there.
        expected: What may become of the command; both where its outcome is not about the payload.
    """

    name: str
    commands: tuple[str, ...]
    plant: Callable[[Path], None]
    expected: tuple[str, ...] = (REFUSED,)


class Pickled:
    """What runs code when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.code = source(folder)

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (self.code,)


def source(folder: Path) -> str:
    return f"open({str(folder / MARKER)!r}, 'w').close()\n"


def pickled(folder: Path) -> bytes:
    return pickle.dumps(Pickled(folder))


def torch_pickled(folder: Path, path: Path) -> None:
    torch.save({"a": Pickled(folder)}, path)


def cases() -> Iterator[Case]:
    for payload in PAYLOADS:
        for command in payload.commands:
            name = f"{payload.name}-{command}"
            expected = f"nothing is executed, and the payload is {' or '.join(payload.expected)}"
            yield Case(KIND, name, expected, functools.partial(_check, payload, command), name in QUICK)


def _check(payload: Payload, command: str, folder: Path) -> None:
    for name in ("model", "run"):
        shutil.copytree(_made() / name, folder / name)
    shutil.copy(_made() / "rows.jsonl", folder)
    settle(folder)
    payload.plant(folder)
    for manifest in folder.rglob(MANIFEST_FILE):  # whoever sends a checkpoint may send one that fits
        manifest.unlink()
    done = subprocess.run(
        [python(), *COMMANDS[command]], cwd=folder, env=ENVIRONMENT, capture_output=True, timeout=SECONDS, check=False,
        input=b"Repeat 3 now:\n",
    )  # fmt: skip
    output = (done.stdout + done.stderr).decode(errors="replace")
    assert not (folder / MARKER).exists(), f"code was executed\n{output[-1500:]}"
    outcome = IGNORED if done.returncode == 0 else REFUSED
    assert outcome in payload.expected, f"exit {done.returncode}\n{output[-1500:]}"
    if outcome == REFUSED and command != "resume":  # which may end in torch's own error, when the file is read
        assert done.returncode == 2, f"exit {done.returncode}\n{output[-1500:]}"
        assert "Traceback" not in output, output[-1500:]


@functools.cache
def _made_once() -> Path:
    """A model, and a run on it with two checkpoints. They name `model`, which is found from the case's folder."""
    folder = Path(tempfile.mkdtemp(prefix="torture-code-"))
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer("decoder_only").save_pretrained(folder / "model")
    rows = [{"document": row["prompt"], "summary": row["completion"].strip()} for row in tiny_rows(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [python(), *TRAIN, "--save_strategy", "steps", "--save_steps", "1", "--output_dir", "run"]
    subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, timeout=SECONDS, check=True)
    return folder


def _made() -> Path:
    with _lock:
        return _made_once()


CLI = ["-m", "left_trainer.cli.main"]
DATA = ["--train_file", "rows.jsonl", "--validation_file", "rows.jsonl", "--test_file", "rows.jsonl"]
SMALL = ["--max_steps", "2", "--generation_max_length", "4", "--per_device_train_batch_size", "4"]
TRAIN = [*CLI, "train", "--model_name_or_path", "model", *DATA, *SMALL]
ENDINGS = ("jsonl", "json", "csv", "parquet", "pkl", "npy", "pth")
SCRIPT = """
import sys
from left_trainer import LeftTrainer, LeftTrainingArguments
import jinja2
rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
args = LeftTrainingArguments(output_dir="out", max_steps=1, report_to="none")
try:
    LeftTrainer("model", args, train_dataset=rows).train()
except jinja2.TemplateError:  # which says what the template may not do
    sys.exit(2)
"""
LOAD = "from left_trainer.models import load_model\nfrom left_trainer.cli.errors import user_errors\n"
LOAD += "with user_errors():\n    load_model('run')\n"
COMMANDS: dict[str, list[str]] = {
    "train": [*TRAIN, "--output_dir", "out"],
    "train further": [*CLI, "train", "--model_name_or_path", "run", *DATA, *SMALL, "--output_dir", "out"],
    "resume": [*TRAIN, "--output_dir", "run", "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "3",
               "--resume_from_checkpoint", "run/checkpoint-1"],
    "generate": [*CLI, "generate", "--adapter", "run", "--max_new_tokens", "3"],
    "evaluate": [*CLI, "evaluate", "--adapter", "run", "--test_file", "rows.jsonl"],
    "merge": [*CLI, "merge", "--adapter", "run", "--output_dir", "merged"],
    "report": [*CLI, "report", "received", "--output_dir", "out"],
    "compare": [*CLI, "compare", "--config", "grid.yaml", "--output_dir", "out"],
    "compare general text": [*CLI, "compare", "--methods", "lora", "--tasks", "summarization", "--model_name_or_path",
                             "model", *DATA, *SMALL, "--general_text_file", "text.txt", "--output_dir", "out"],
    "config": [*CLI, "train", "--config", "grid.yaml", "--output_dir", "out"],
    "data set": [*CLI, "train", "--model_name_or_path", "model", *SMALL, "--dataset_name", "received", "--output_dir",
                 "out", "--source_column", "document", "--target_column", "summary"],
    "messages": ["-c", SCRIPT],
    "load": ["-c", LOAD],
    **{f"file.{ending}": [*CLI, "train", "--model_name_or_path", "model", *SMALL, "--train_file", f"file.{ending}",
                          "--output_dir", "out"] for ending in ENDINGS},
    **{f"--{flag}": [*TRAIN, "--output_dir", "out", f"--{flag}", "__import__('os').system('touch executed')"]
       for flag in ("peft_kwargs", "lr_scheduler_kwargs", "optim_args", "model_init_kwargs", "generation_config")},
}  # fmt: skip
USING = ("generate", "evaluate", "merge", "train further")


def settle(folder: Path) -> None:
    """Modules that code could be imported from where commands run."""
    (folder / "planted.py").write_text(source(folder))


def edit(path: Path, **values: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def bytes_in(*names: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(pickled(folder))

    return plant


def torch_in(*names: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        for name in names:
            torch_pickled(folder, folder / name)

    return plant


def text_in(name: str, text: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.replace("MARKER", str(folder / MARKER)))

    return plant


def values_in(name: str, **values: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, **values)


def all_of(*plants: Callable[[Path], None]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        for each in plants:
            each(folder)

    return plant


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def remote_code(name: str, **auto_map: str) -> Callable[[Path], None]:
    """Code beside a model that its config names."""

    def plant(folder: Path) -> None:
        edit(folder / name, auto_map=auto_map)
        (folder / name).with_name("planted.py").write_text(source(folder) + "class Planted:\n    pass\n")

    return plant


def prompt_of_the_run(prompt: str) -> Callable[[Path], None]:
    return values_in("run/training_report.json", prompt=prompt)


def results(**values: object) -> Callable[[Path], None]:
    """A result that somebody sent, of which some fields are hostile."""

    def plant(folder: Path) -> None:
        report = json.loads((folder / "run" / "training_report.json").read_text())
        conditions = {"base_model": "m", "prompt": "{source}", "data_sha256": "0", "max_new_tokens": 4, "num_beams": 1}
        cell = {"kind": "method", "task": "summarization", "arguments": {"peft_method": "lora", "seed": 42}}
        cell |= {"conditions": {**conditions, **values}, "general_text_file": None, "save_adapter": False}
        (folder / "received").mkdir(exist_ok=True)
        line = {"cell": cell, "report": {**report, **values}, "failure": None}
        (folder / "received" / "results.jsonl").write_text(json.dumps(line) + "\n")

    return plant


AUTO_MAP = {"AutoConfig": "planted.Planted", "AutoModelForCausalLM": "planted.Planted"}
YAML = "!!python/object/apply:os.system ['touch MARKER']"
JINJA = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for c in [].__class__.__base__.__subclasses__() %}{% if "
JINJA += "c.__name__ == 'catch_warnings' %}{{ c()._module.__builtins__['open']('MARKER', 'w') }}{% endif %}{% endfor %}"
GLOBALS = "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}{{ raise_exception.__globals__ }}"
README = f"---\nconfigs:\n- config_name: default\n  data_files: {YAML}\n---\n"
BOTH = (REFUSED, IGNORED)

PAYLOADS = (
    Payload("adapter_model.bin", USING, all_of(without("run/adapter_model.safetensors"),
                                               torch_in("run/adapter_model.bin"))),
    Payload("adapter_model.bin beside safetensors", ("generate",), torch_in("run/adapter_model.bin"), (IGNORED,)),
    Payload("pickle named safetensors", USING, bytes_in("run/adapter_model.safetensors")),
    Payload("training_args.bin", USING, torch_in("run/training_args.bin"), (IGNORED,)),
    Payload("training state", ("train further",), bytes_in("run/training_state.safetensors"), BOTH),
    Payload("auto_mapping", USING, values_in("run/adapter_config.json", auto_mapping={
        "base_model_class": "Planted", "parent_library": "planted"}), BOTH),
    Payload("peft_type", ("generate", "merge"), values_in("run/adapter_config.json", peft_type="planted.Planted")),
    Payload("adapter config with a pickle", ("generate",), bytes_in("run/adapter_config.json")),
    Payload("auto_map of the base", ("train", "generate", "evaluate", "merge"),
            all_of(remote_code("model/config.json", **AUTO_MAP), values_in("model/config.json", model_type="planted"))),
    Payload("auto_map of a known type", ("train", "generate"), remote_code("model/config.json", **AUTO_MAP), BOTH),
    Payload("consent of the run itself", (*USING, "load"), all_of(
        remote_code("model/config.json", **AUTO_MAP), values_in("model/config.json", model_type="planted"),
        values_in("run/run_settings.json", model_init_kwargs={"trust_remote_code": True}))),
    Payload("tokenizer with code", ("train",), all_of(
        remote_code("model/tokenizer_config.json", AutoTokenizer="planted.Planted"),
        values_in("model/tokenizer_config.json", auto_map={"AutoTokenizer": ["planted.Planted", "planted.Planted"]},
                  tokenizer_class="Planted")), BOTH),
    Payload("tokenizer of the run with code", ("generate", "merge"), all_of(
        remote_code("run/tokenizer_config.json"),
        values_in("run/tokenizer_config.json", auto_map={"AutoTokenizer": ["planted.Planted", "planted.Planted"]},
                  tokenizer_class="Planted")), BOTH),
    Payload("custom_generate", ("generate",), all_of(
        text_in("model/custom_generate/generate.py", "open('MARKER', 'w').close()\ndef generate(*a, **k): pass\n"),
        values_in("run/generation_config.json", custom_generate="model")), BOTH),
    Payload("pytorch_model.bin", ("train", "generate"), all_of(without("model/model.safetensors"),
                                                              torch_in("model/pytorch_model.bin"))),
    Payload("sharded pytorch_model.bin", ("train",), all_of(
        without("model/model.safetensors"), torch_in("model/pytorch_model-00001-of-00001.bin"),
        values_in("model/pytorch_model.bin.index.json", metadata={},
                  weight_map={"lm_head.weight": "pytorch_model-00001-of-00001.bin"}))),
    Payload("pickle named model.safetensors", ("train",), bytes_in("model/model.safetensors")),
    *(Payload(f"prompt {number}", ("generate", "evaluate"), prompt_of_the_run(prompt))
      for number, prompt in enumerate(("{source.__class__}", "{source:>9999999999}", "{x.__class__} {source}",
                                       "{source.__class__.__init__.__globals__}", "{0} {source}", "{source!r:{x}}"))),
    Payload("optimizer.pt", ("resume",), torch_in("run/checkpoint-1/optimizer.pt"), BOTH),
    Payload("scheduler.pt", ("resume",), torch_in("run/checkpoint-1/scheduler.pt"), BOTH),
    Payload("rng_state.pth", ("resume",), torch_in("run/checkpoint-1/rng_state.pth"), BOTH),
    Payload("training_args.bin of a checkpoint", ("resume",), torch_in("run/checkpoint-1/training_args.bin"), BOTH),
    Payload("adapter of a checkpoint", ("resume",), all_of(
        without("run/checkpoint-1/adapter_model.safetensors"), torch_in("run/checkpoint-1/adapter_model.bin"))),
    Payload("trainer_state.json", ("resume",), values_in("run/checkpoint-1/trainer_state.json", stateful_callbacks={
        "planted.Planted": {"args": {}, "attributes": {}}}), BOTH),
    Payload("loading script", ("data set",), all_of(
        text_in("received/received.py", "open('MARKER', 'w').close()\n"),
        text_in("received/dataset_infos.json", "{}"))),
    Payload("front matter of a data set", ("data set",), all_of(
        text_in("received/README.md", README), text_in("received/data.jsonl", '{"document": "a", "summary": "b"}\n'))),
    Payload("pickle as data", tuple(name for name in COMMANDS if name.startswith("file.")),
            bytes_in(*(name for name in COMMANDS if name.startswith("file.")))),
    Payload("pickled rows in a folder", ("data set",), bytes_in("received/data.pkl", "received/train.npy")),
    Payload("pickle as test file", ("evaluate",), bytes_in("rows.jsonl")),
    Payload("pickle as general text", ("compare general text",), bytes_in("text.txt")),
    Payload("yaml tag", ("compare", "config"), text_in("grid.yaml", f"methods: {YAML}\n")),
    Payload("yaml tag of a new object", ("compare", "config"),
            text_in("grid.yaml", "title: !!python/object:planted.X {}")),
    Payload("yaml module", ("compare", "config"), text_in("grid.yaml", "title: !!python/module:planted")),
    Payload("chat template", ("messages",), text_in("model/chat_template.jinja", JINJA)),
    Payload("chat template with globals", ("messages",), text_in("model/chat_template.jinja", GLOBALS)),
    Payload("results with a pickle", ("report",), bytes_in("received/results.jsonl")),
    Payload("results with a format", ("report",), results(prompt="{source:>9999999999}{x.__class__}"), (IGNORED,)),
    Payload("results with scripts", ("report",), results(
        base_model="</script><script>alert(1)</script>", machine="$\\write18{touch MARKER}$"), (IGNORED,)),
    Payload("code in a flag", tuple(name for name in COMMANDS if name.startswith("--")), lambda folder: None),
)  # fmt: skip
