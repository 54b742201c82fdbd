"""The results as records, one JSON object per line, and their means over the seeds of an arm."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from flame.base.errors import UsageError
from flame.base.files import write_atomically
from flame.run.metrics_file import strict_json

RECORDS_FILE = "records.jsonl"
KEYS = ("metric", "model", "label", "layer", "head", "length", "value")
"""Keys of every record; a metric may have more, such as ``eps``."""

Record = dict[str, Any]


class Recorder:
    """Collects the records of one model."""

    def __init__(self, model: str, label: str) -> None:
        self.model, self.label = model, label
        self.records: list[Record] = []

    def add(
        self,
        metric: str,
        value: float | str | None,
        *,
        layer: int | None = None,
        head: int | None = None,
        length: int | None = None,
        **extra: Any,
    ) -> None:
        """Adds a record; ``layer`` None means the whole model, ``head`` None the whole layer."""
        own = (metric, self.model, self.label, layer, head, length, value)
        self.records.append(dict(zip(KEYS, own, strict=True)) | extra)


def write_records(file: Path, records: Iterable[Record]) -> None:
    """Writes the file atomically; numbers that are not finite become null."""
    write_atomically(file, "".join(strict_json(r) + "\n" for r in records))


def read_records(file: Path) -> list[Record]:
    """The records of a file.

    Raises:
        UsageError: There is no such file, or a line is not a record.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--report_only: {file} cannot be read: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"--report_only: {file}, line {number}: {error}") from None
        if not isinstance(record, dict) or any(key not in record for key in KEYS):
            raise UsageError(f"--report_only: {file}, line {number} lacks one of {', '.join(KEYS)}")
        records.append(record)
    if not records:
        raise UsageError(f"--report_only: {file} holds no records")
    return records


class Mean(NamedTuple):
    """Mean and standard deviation over the seeds of an arm."""

    mean: float
    std: float | None
    """Standard deviation of a sample (n - 1); None for one seed."""
    n: int

    def scaled(self, factor: float) -> "Mean":
        """Mean and deviation in another unit."""
        return Mean(self.mean * factor, None if self.std is None else self.std * factor, self.n)


def mean_of(values: Iterable[float | None]) -> Mean | None:
    """Mean and deviation of the values; None without values, NaN if one was not finite."""
    values = [math.nan if x is None else x for x in values]
    if not values:
        return None
    n, mean = len(values), sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / (n - 1) if n > 1 else None
    return Mean(mean, None if variance is None else math.sqrt(variance), n)


class Results:
    """Records indexed by metric, in the order of the command line."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self.by_metric: dict[str, list[Record]] = {}
        for record in records:
            self.by_metric.setdefault(record["metric"], []).append(record)
        setup = self.by_metric.get("setup")
        models = self.by_metric.get("model")
        if not setup or not models:
            raise UsageError("--report_only: the records lack those of metric setup and model")
        self.setup, self.models = setup[0], models
        self.labels = list(dict.fromkeys(r["label"] for r in models))
        self.lengths = sorted({r["length"] for r in self.by_metric.get("loss", ())})

    @property
    def training_length(self) -> int | None:
        """The training length, the shortest if the models differ; None if no run says it."""
        # older records lack the key
        known = [n for r in self.models if (n := r.get("training_length")) is not None]
        return min(known, default=None)

    @property
    def main_length(self) -> int:
        """The length of training, or the longest measured one below it; if all are longer, the shortest."""
        trained = math.inf if self.training_length is None else self.training_length
        return max((n for n in self.lengths if n <= trained), default=min(self.lengths))

    @property
    def lengths_to_show(self) -> list[int]:
        """`main_length`, then the other lengths from the longest down."""
        first = self.main_length
        return [first, *sorted((n for n in self.lengths if n != first), reverse=True)]

    def where(self, metric: str, **keys: Any) -> list[Record]:
        """Records of a metric whose ``keys`` have these values; a key that is not there is None."""
        return [
            r
            for r in self.by_metric.get(metric, ())
            if all(r.get(key) == value for key, value in keys.items())
        ]

    def of_model(self, metric: str, label: str, length: int | None, **keys: Any) -> Mean | None:
        """A metric of whole models, averaged over the seeds of ``label``."""
        keys |= {"label": label, "length": length, "layer": None, "head": None}
        return mean_of(r["value"] for r in self.where(metric, **keys))

    def series(
        self,
        metric: str,
        label: str,
        x: Callable[[Record], float | None],
        **keys: Any,
    ) -> dict[float, Mean]:
        """Means over the seeds of a label, by the number ``x`` of a record, in ascending order."""
        groups: dict[float, list[float | None]] = {}
        for record in self.where(metric, label=label, **keys):
            key = x(record)
            if key is not None:
                groups.setdefault(key, []).append(record["value"])
        return {key: mean_of(groups[key]) for key in sorted(groups)}  # pyright: ignore[reportReturnType]  # each group has at least one value, so no mean is None
