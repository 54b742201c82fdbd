"""Writers of the metrics of a run: ``metrics.jsonl``, TensorBoard, Weights & Biases."""

import importlib.util
import json
import math
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from flame.base.errors import UsageError
from flame.base.files import write_atomically
from flame.config.sections import JobConfig

METRICS_FILE = "metrics.jsonl"
"""Name of the file in the dump folder."""


class Writer(Protocol):
    """Where the numbers of a step go."""

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Writes numbers by name, all of one step; steps do not decrease."""

    def close(self) -> None:
        """Writes out what is buffered; nothing can be written afterwards."""


def strict_json(value: Any, *, indent: int | None = None) -> str:
    """Standard JSON: numbers that are not finite become null."""

    def finite(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: finite(item) for key, item in x.items()}
        if isinstance(x, list | tuple):
            return [finite(item) for item in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(finite(value), allow_nan=False, indent=indent)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records that `JsonLines` wrote. The last line may be unfinished, by a running or a killed run.

    Raises:
        UsageError: The file cannot be read, or a line other than an unfinished last one is damaged.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if not line.endswith("\n"):
                break
            raise UsageError(f"{file}, line {number} is damaged: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UsageError(f"{file}, line {number} is damaged: it is not an object with a step")
        records.append(record)
    return records


class JsonLines:
    """One object per line: ``step``, ``time`` (seconds since 1970) and the numbers, written out at once.

    Opening drops the steps that a continued run will repeat, and an unfinished last line.

    Args:
        file: Created if it does not exist.
        start_step: Step of the checkpoint that the run continues from; 0 for a new one.
    """

    def __init__(self, file: Path, start_step: int) -> None:
        kept, self.done = [], set()
        self.start_step = start_step
        if file.exists():
            for record in read_metrics(file):
                if record["step"] <= start_step:
                    kept.append(strict_json(record) + "\n")
                if record["step"] == start_step:
                    self.done |= record.keys()
        write_atomically(file, "".join(kept))
        # unbuffered, so that a full disk raises in the write that hits it, not later
        self.stream = open(file, "ab", buffering=0)  # noqa: SIM115  # closed by `close`

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Appends a line, unless the step is the one that the run continues from and its numbers are there."""
        if step == self.start_step and scalars.keys() <= self.done:
            # a finished run that is started again measures its last step again
            return
        record = {"step": step, "time": round(time.time(), 3), **scalars}
        line = memoryview((strict_json(record) + "\n").encode())
        while line:
            # a nearly full disk accepts only a part of the line
            line = line[self.stream.write(line) :]

    def close(self) -> None:
        """Closes the file, to which every line is written already."""
        self.stream.close()


class TensorBoard:
    """Scalars by name. A continued run hides the steps that it will repeat."""

    def __init__(self, folder: Path, start_step: int) -> None:
        _silence_failed_threads()
        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=10)

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Queues the numbers; a thread writes them within 10 seconds."""
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes out what is queued."""
        self.writer.close()


def _silence_failed_threads() -> None:
    """Drops the traceback of TensorBoard's thread on an OSError, which the main thread raises again."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        is_tensorboard = type(args.thread).__module__.startswith("tensorboard.")
        if not (is_tensorboard and isinstance(args.exc_value, OSError)):
            before(args)

    threading.excepthook = hook


def require_wandb() -> None:
    """Raises UsageError where the package is missing."""
    if importlib.util.find_spec("wandb") is None:
        raise UsageError(
            "--metrics.enable_wandb needs the package wandb, which is not installed: pip install wandb"
        )


class WeightsAndBiases:
    """Logs the run to wandb under one id, so that a continued run continues its curves."""

    def __init__(self, config: JobConfig) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  # not a dependency; needed by --metrics.enable_wandb only

        folder = config.dump_folder
        file = folder / "wandb_id"
        if not file.exists():
            write_atomically(file, f"{uuid.uuid4().hex[:12]}\n")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "flame"),
            name=os.environ.get("WANDB_NAME", folder.name),
            id=os.environ.get("WANDB_RUN_ID", file.read_text(encoding="utf-8").strip()),
            resume="allow",
            notes=config.job.description or None,
            dir=str(folder),
            config=config.flags(),
        )

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Sends the numbers of a step."""
        self.run.log(scalars, step=step)

    def close(self) -> None:
        """Marks the run as finished, once everything is sent."""
        self.run.finish()
