"""The state of a run, read from its folder; a sweep keeps no state of its own."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from flame.base.errors import UsageError
from flame.run.metrics_file import METRICS_FILE, read_metrics
from flame.sweeps.plan import Run


@dataclass(frozen=True, slots=True)
class State:
    """How far a run is, from its metrics and its exported model."""

    step: int
    """The last logged step."""
    loss: float | None
    """Training loss of the last logged step that has one."""
    validation_loss: float | None
    """Validation loss of the trained model, in nats per token; None before the last step."""
    is_exported: bool
    seconds_per_step: float | None
    """Mean between the first and the last logged step, with validation and saving, without start-up; None with
    fewer than two logged steps."""

    @property
    def is_finished(self) -> bool:
        """Whether the run has trained all steps and exported its model."""
        # a run writes the export last, and atomically
        return self.is_exported and self.validation_loss is not None


def read_state(run: Run, since: float = 0.0) -> State:
    """The state of a run, with its speed after the time ``since``."""
    file = run.folder / METRICS_FILE
    records = read_metrics(file) if file.is_file() else []
    steps = run.config.training.steps
    final = [x["validation_loss"] for x in records if x["step"] == steps and "validation_loss" in x]
    trained = [x for x in records if "loss" in x]
    return State(
        step=records[-1]["step"] if records else 0,
        loss=trained[-1]["loss"] if trained else None,
        validation_loss=final[-1] if final else None,
        is_exported=(run.folder / "hf" / "config.json").is_file(),
        seconds_per_step=_seconds_per_step(trained, _starts(run.folder), since),
    )


def _starts(folder: Path) -> list[float]:
    """When the run was started and continued, in seconds since 1970."""
    starts = []
    for file in (folder / "record").glob("*.json"):
        try:
            start = json.loads(file.read_text(encoding="utf-8"))["start"]
            starts.append(datetime.fromisoformat(start).timestamp())
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(f"{file} cannot be read: {type(error).__name__}: {error}") from None
    return starts


def _seconds_per_step(
    trained: list[dict[str, Any]], starts: list[float], since: float
) -> float | None:
    seconds = steps = 0
    for before, after in zip(trained, trained[1:], strict=False):
        # skip intervals that contain a restart
        has_restart = any(before["time"] < start <= after["time"] for start in starts)
        if before["time"] >= since and not has_restart:
            seconds += after["time"] - before["time"]
            steps += after["step"] - before["step"]
    return seconds / steps if steps else None
