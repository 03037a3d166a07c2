"""Writing a trained model in another format, verified before it appears."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from left_trainer.export.formats import (
    ExportFormat,
    Trained,
    check_model,
    check_precision,
    default_precision,
    get_format,
)
from left_trainer.export.greedy import Reference
from left_trainer.export.rows import RowsAsked, prompts_of_run
from left_trainer.export.verification import HALF, VERIFICATION_FILE, Verification, verify
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.plain_lora import may_be_lora
from left_trainer.methods.saving import adapter_method
from left_trainer.models import ModelSource, without_adapter
from left_trainer.runs.inference import Generator, source_for_use
from left_trainer.runs.json_records import write_json
from left_trainer.runs.merging import merge_adapter
from left_trainer.storage.locks import beside_lock, folder_lock
from left_trainer.storage.whole import whole_directory
from left_trainer.trainer.checkpoints import RESULT_FILES, checkpoints_in, why_not_loadable

AS_IT_IS = (
    "Serve it as it is, with PEFT: PeftModel.from_pretrained(base, path), or left-trainer generate --adapter path."
)


@dataclass(frozen=True)
class Export:
    """What is asked for.

    Args:
        path: Folder of a run.
        to: Name of a format.
        output_dir: New folder; by default beside `path`, with the format in its name.
        precision: Of the weights; by default that of the run.
        rows: Test rows that it is verified on.
        max_new_tokens: Of the answers that are compared; by default that of the run.
        rank: Of a LoRA that approximates another method.
        as_adapter: Write the adapter alone, where the format has a form for it.
        trust_remote_code: Whether code that comes with the base model may run.
        dtype: To load the base model's weights with; by default that of the run.
    """

    path: str
    to: str
    output_dir: str | None = None
    precision: str | None = None
    rows: RowsAsked = field(default_factory=RowsAsked)
    max_new_tokens: int | None = None
    rank: int | float | None = None
    as_adapter: bool = False
    trust_remote_code: bool = False
    dtype: str | None = None

    @property
    def folder(self) -> Path:
        """Where the export will be."""
        return Path(self.output_dir) if self.output_dir else Path(f"{self.path.rstrip('/')}-{self.to}")


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Args:
        folder: That holds it.
        precision: Of its weights.
        verification: On test rows.
        usage: Code that loads it.
    """

    folder: Path
    precision: str
    verification: Verification
    usage: str


def export_model(asked: Export) -> Exported:
    """Export the trained model in `asked.path`. The folder is whole or absent: it appears once it is verified.

    Raises:
        ValueError: The method, the model or an option does not fit the format, or the export writes something else than
            the trained model.
        ImportError: A package is missing; the message says how to install it.
        FileExistsError: The output folder is not empty.
        WriteFailedError: The disk is full, read-only or gone.
    """
    record = get_format(asked.to, asked.path)
    record.check_installed()
    check_precision(record, asked.precision)
    _check_empty(asked.folder)
    _check_finished(Path(asked.path))
    source = source_for_use(asked.path, asked.trust_remote_code, asked.dtype)
    check_method(record, adapter_method(source), source, asked)
    check_model(record, source.family, source.config.model_type, asked.path)
    template, prompts = prompts_of_run(asked.path, asked.rows)
    generator = Generator(
        asked.path, prompt=template, trust_remote_code=asked.trust_remote_code, dtype=asked.dtype, device="cpu"
    )
    reference = Reference(generator, prompts, asked.max_new_tokens)
    dtype = str(without_adapter(generator.model).dtype).removeprefix("torch.")
    precision = asked.precision or default_precision(record, dtype)
    trained = Trained(Path(asked.path), source, reference, precision, asked.rank, asked.as_adapter)
    with (
        folder_lock(asked.folder, lock_file=beside_lock(asked.folder)),
        whole_directory(asked.folder) as folder,
        _plain(trained, record, asked, folder.parent) as with_plain,
    ):
        verification = _write(record, with_plain, folder)
    return Exported(asked.folder, precision, verification, record.code.usage(trained, asked.folder))


def check_method(record: ExportFormat, method: PeftMethod | None, source: ModelSource, asked: Export) -> None:
    """Raise `ValueError` where what was trained has no form in `record`, with the reason and what to do instead."""
    name = method.name if method else (source.settings.method if source.settings else None) or "an unknown method"
    takes_adapter = record.takes_adapter or asked.as_adapter
    if asked.as_adapter and record.name != "gguf":
        raise ValueError(f"--as_adapter is for --to gguf. --to {record.name} has one form alone: remove it.")
    if source.adapter is None:
        if takes_adapter or record.name == "merged":
            raise ValueError(
                f"{asked.path!r} holds a whole model and no adapter, so there is nothing to "
                f"{'write as a LoRA' if takes_adapter else 'merge'}: transformers loads it as it is. Export it "
                "with --to ctranslate2, gguf or onnx."
            )
        return
    if takes_adapter and not may_be_lora(method):
        raise ValueError(
            f"{asked.path!r} was trained with {name}, which adds inputs or layers and changes no weight of the base: "
            f"no LoRA can hold it. {AS_IT_IS}"
        )
    if not takes_adapter and source.is_quantized:
        raise ValueError(
            f"{asked.path!r} was trained with {name} on a quantized base, whose weights merging would round again. "
            "Export the adapter alone: --to lora."
        )
    if not takes_adapter and (method is None or not method.mergeable):
        raise ValueError(
            f"{asked.path!r} was trained with {name}, which adds inputs or layers that no weight of the base can hold, "
            f"so --to {record.name} cannot write it. {AS_IT_IS}"
        )


@contextlib.contextmanager
def _plain(trained: Trained, record: ExportFormat, asked: Export, beside: Path) -> Iterator[Trained]:
    """`trained` with the folder of the merged model, which goes when the format has been made of it."""
    if record.takes_adapter or asked.as_adapter or record.name == "merged":
        yield trained
    elif trained.source.adapter is None:
        yield dataclasses.replace(trained, plain=trained.path)
    else:
        with tempfile.TemporaryDirectory(prefix=f".{asked.folder.name}.", dir=beside) as folder:
            plain = Path(folder) / "merged"
            merge_adapter(asked.path, plain, asked.trust_remote_code, asked.dtype)
            yield dataclasses.replace(trained, plain=plain)


def _write(record: ExportFormat, trained: Trained, folder: Path) -> Verification:
    """Write the files into `folder` and compare answers. Raises `ValueError` where they are not the trained ones."""
    record.code.write(trained, folder)
    answers, runtime = record.code.answers(trained, folder), record.code.runtime()
    tolerance = record.precisions.get(trained.precision) or record.code.tolerance(trained)
    if trained.source.is_quantized:  # whose kernels compute in half precision
        tolerance = max(tolerance, HALF)
    verification = verify(trained.reference, answers, tolerance, runtime)
    if not verification.holds:
        raise ValueError(
            f"--to {record.name} does not write what the model in {str(trained.path)!r} writes, by more than rounding "
            f"({tolerance:g} nats), so nothing was kept. {verification}\n{record.otherwise}"
        )
    write_json(folder / VERIFICATION_FILE, verification)
    return verification


def _check_finished(run: Path) -> None:
    """Refuse the folder of a run that was interrupted: what it has trained is in its checkpoints."""
    whole = [path for path in checkpoints_in(run) if why_not_loadable(path) is None]
    if whole and not any((run / name).exists() for name in RESULT_FILES):
        raise ValueError(
            f"--adapter {str(run)!r} holds no trained model: its run was interrupted. Finish it, with the command that "
            f"started it and --resume_from_checkpoint true, or export its last checkpoint: --adapter {whole[-1]}"
        )


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"--output_dir {str(folder)!r} exists and is not empty. Choose a new folder.")
