"""Training curves of runs as records."""

import json
from pathlib import Path

from flame.analysis.records import Recorder
from flame.errors import UsageError
from flame.writers import METRICS_FILE

_NAMES = ("loss", "validation_loss", "grad_norm")
MAX_POINTS = 400


def find_curves(run: Path) -> Path:
    """The file of numbers below a run's folder.

    Raises:
        UsageError: There is none, or several.
    """
    files = [run / METRICS_FILE] if (run / METRICS_FILE).is_file() else []
    files = files or sorted(run.rglob(METRICS_FILE))
    if len(files) != 1:
        what = f"{len(files)} files" if files else "no file"
        raise UsageError(
            f"--run {run} must be the --job.dump_folder of one run: {what} {METRICS_FILE} in it"
        )
    return files[0]


def record_curves(file: Path, recorder: Recorder) -> None:
    """Adds the losses, gradient norms and attention statistics of a whole model by step.

    Of a long curve evenly spaced points are kept, `MAX_POINTS` about, and the last one.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            numbers = json.loads(line)
            step = numbers["step"]
        except (ValueError, LookupError, TypeError) as error:
            raise UsageError(f"--run: {file}, line {number} is damaged: {error}") from None
        for name, value in numbers.items():
            if name in _NAMES or (name.startswith("attention/") and name.count("/") == 1):
                curves.setdefault(name, []).append((step, value))
    if not curves:
        raise UsageError(f"--run: {file} has none of {', '.join(_NAMES)}")
    for name, points in curves.items():
        stride = -(-len(points) // MAX_POINTS)
        kept = points[::stride]
        if kept[-1] != points[-1]:
            kept.append(points[-1])
        for step, value in kept:
            recorder.add("curve", value, name=name, step=step)
