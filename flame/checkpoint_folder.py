"""The checkpoints of a run on disk: written in one piece, found, described and deleted.

A folder ``step-N`` is a complete checkpoint: it is written as ``step-N.saving`` and renamed when everything
in it has reached the disk. What is being deleted is called ``step-N.deleting``. Both kinds are left behind by
a kill, and removed by the next run.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from flame.log import logger

_SAVING, _DELETING = ".saving", ".deleting"


def step_of(path: Path) -> int:
    """``N`` of a folder ``step-N``; -1 for any other name."""
    number = path.name.removeprefix("step-")
    return int(number) if path.name.startswith("step-") and number.isdecimal() else -1


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder was saved to the end; torch writes the metadata last."""
    return (checkpoint / ".metadata").is_file()


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints ``step-N``, oldest first."""
    steps = [path for path in folder.glob("step-*") if step_of(path) >= 0 and is_complete(path)]
    return sorted(steps, key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint ``step-N`` with the largest ``N``."""
    return next(reversed(complete_checkpoints(folder)), None)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed run left half written or half deleted; no run may be saving there."""
    for path in folder.glob("step-*"):
        is_half = path.suffix in (_SAVING, _DELETING) and step_of(path.with_suffix("")) >= 0
        if is_half or (step_of(path) >= 0 and not is_complete(path)):
            logger.info(f"removing {path}, which a killed run left incomplete")
            shutil.rmtree(path)


def remove_unfinished(folder: Path, step: int) -> None:
    """Removes what a failed save of ``step`` has written."""
    shutil.rmtree(folder / f"step-{step}{_SAVING}", ignore_errors=True)


def purge(folder: Path, keep: int) -> None:
    """Deletes the oldest complete checkpoints until ``keep`` are left; 0 keeps all."""
    for path in complete_checkpoints(folder)[:-keep] if keep else []:
        doomed = path.with_name(path.name + _DELETING)
        try:
            # first of all it stops to be a checkpoint
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            # somebody may be reading it; the run does not depend on it, and the next purge or run tries again
            logger.warning(f"{path} could not be deleted: {error}")


def fsync(path: Path) -> None:
    """Sends a file's content, or a folder's entries, to the disk, so that a power loss keeps them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicWriter(FileSystemWriter):
    """Writes a distributed checkpoint that appears under its name when it is whole and on the disk.

    Args:
        path: The checkpoint's folder. What is there must not be a complete checkpoint.
        staged: Whether the tensors are on the CPU already.
        then: Called with ``path`` on the coordinating rank once the checkpoint is there.
    """

    def __init__(
        self, path: Path, *, staged: bool = True, then: Callable[[Path], None] | None = None
    ) -> None:
        # copying ahead is for tensors on a GPU; with others torch would start a stream for nothing
        ahead = {"per_thread_copy_ahead": 0} if staged else {}
        super().__init__(path.with_name(path.name + _SAVING), **ahead)
        self.final = path
        self.then = then

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Runs on the coordinating rank, after all ranks have written and synced their files."""
        super().finish(metadata, results)
        fsync(self.path)
        if self.final.exists():
            if is_complete(self.final):
                raise FileExistsError(f"{self.final} is a complete checkpoint already")
            shutil.rmtree(self.final)
        self.path.rename(self.final)
        fsync(self.final.parent)
        if self.then is not None:
            self.then(self.final)


def read_contents(checkpoint: Path) -> dict[str, torch.Size | None]:
    """Name -> shape of everything in a complete checkpoint; None for what is no tensor."""
    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {
        name: entry.size if isinstance(entry, TensorStorageMetadata) else None
        for name, entry in entries.items()
    }


def has_weights_only(contents: dict[str, torch.Size | None]) -> bool:
    """Whether a checkpoint holds a model to start from but no run to continue."""
    return "train_state.step" not in contents
