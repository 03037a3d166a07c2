"""Machines without a common disk: what the first process has in its folders, the others get before they read it.

The first process writes what a run keeps. On another machine's own disk `Trainer` would find nothing to go on from, and
load the best model in the processes of the first machine alone.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed

from left_trainer.storage.manifest import checksum
from left_trainer.storage.whole import whole_files
from left_trainer.training_args import LeftTrainingArguments

MACHINE = "GROUP_RANK"  # in which torchrun numbers machines
BLOCK_BYTES = 2**26  # that travel at once
# Size, time of change and number of a file on its disk: where they are the same, so is the file.
Stamp: TypeAlias = tuple[int, int, int]


def on_every_machine(path: str | Path | None, args: LeftTrainingArguments) -> str | None:
    """Have in every process the folder `path` of the first one, with its files. Every process has to call it.

    Args:
        path: Of the first process; what others pass does not count. `None` where there is none.
        args: Of the run; a folder in `output_dir` is in that of each process, which need not be called the same.

    Returns:
        The path of the folder in this process.

    Raises:
        WriteFailedError: The disk of this machine is full, read-only or gone.
    """
    if args.world_size == 1 or args.output_dir is None:
        return None if path is None else str(path)
    given, output_dir = of_first_process((path and str(path), str(args.output_dir)))
    if given is None:
        return None
    is_inside = Path(given).is_relative_to(output_dir)
    own = Path(args.output_dir) / Path(given).relative_to(output_dir) if is_inside else Path(given)
    _bring(Path(given), own, args)
    return str(own)


def of_first_process(value: Any) -> Any:
    """What the first process has, in all of them."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


@torch.no_grad()
def copy_from_first(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Give every process the values that the first one has in `tensors`, over `device`: of the process."""
    if PartialState().num_processes == 1:
        return
    for tensor in (each.data for each in tensors if not each.is_meta):
        on_device = tensor.to(device).contiguous()
        distributed.broadcast(on_device, src=0)
        tensor.copy_(on_device)


def is_first_of_its_disk(folder: Path, args: LeftTrainingArguments) -> bool:
    """Whether this process writes into `folder` for all that see it: those of a machine, as far as is known.

    Every process has to ask.
    """
    place = (platform.node(), os.environ.get(MACHINE), str(folder.resolve()))
    places = gather_object([(place, args.process_index)])
    return args.process_index == min(process for there, process in places if there == place)


def _bring(given: Path, own: Path, args: LeftTrainingArguments) -> None:
    is_first, writes = args.process_index == 0, is_first_of_its_disk(own, args)
    stamps: dict[str, Stamp] = of_first_process(_stamps(given) if is_first else None)
    here = {} if is_first else _stamps(own)
    other = [name for name in stamps if here.get(name) != stamps[name]] if writes and not is_first else []
    asked = set(gather_object(other))
    # Read only where a file is not the same one: on a common disk no file is.
    sums = of_first_process({name: checksum(given / name) for name in asked} if is_first else None)
    lacking = {name for name in other if name not in here or checksum(own / name) != sums[name]}
    with whole_files(own, sum(stamps[name][0] for name in lacking)) if lacking else contextlib.nullcontext() as folder:
        for name in sorted(set(gather_object(list(lacking)))):
            blocks = _blocks(given / name) if is_first else None
            _receive(blocks, stamps[name][0], folder / name if folder is not None and name in lacking else None)
    of_first_process(None)  # whoever reads next does so when all is there


def _stamps(folder: Path) -> dict[str, Stamp]:
    """The files below a folder, which need not exist, by their names in it."""
    found = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (each.st_size, each.st_mtime_ns, each.st_ino) for name, each in sorted(found.items())}


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _receive(blocks: Iterator[bytes] | None, size: int, target: Path | None) -> None:
    """Send a file of `size` bytes from the first process, and write it to `target` where that is given."""
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") if target is not None else contextlib.nullcontext() as file:
        for _ in range(-(-size // BLOCK_BYTES)):
            block = of_first_process(next(blocks) if blocks is not None else None)
            if file is not None:
                file.write(block)
