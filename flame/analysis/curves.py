"""Training curves of runs as records."""

from pathlib import Path

from flame.analysis.records import Recorder
from flame.base.errors import UsageError
from flame.run.metrics_file import METRICS_FILE, read_metrics

_NAMES = ("loss", "validation_loss", "grad_norm")
MAX_POINTS = 400

Curves = dict[str, list[tuple[int, float | None]]]
"""Name -> (step, value); the value is None where it was not finite."""


def read_curves(run: Path) -> Curves:
    """The losses, gradient norms and attention statistics of a whole model, from the metrics file below ``run``.

    Raises:
        UsageError: There is no such file, or several, or it is damaged or has none of them.
    """
    files = [run / METRICS_FILE] if (run / METRICS_FILE).is_file() else []
    files = files or sorted(run.rglob(METRICS_FILE))
    if len(files) != 1:
        what = f"{len(files)} files" if files else "no file"
        raise UsageError(
            f"--run {run} must be the --job.dump_folder of one run: {what} {METRICS_FILE} in it"
        )
    try:
        records = read_metrics(files[0])
    except UsageError as error:
        raise UsageError(f"--run {run}: {error}") from None
    curves: Curves = {}
    for numbers in records:
        for name, value in numbers.items():
            if name in _NAMES or (name.startswith("attention/") and name.count("/") == 1):
                if value is not None and not isinstance(value, int | float):
                    raise UsageError(
                        f"--run {run}: {files[0]} is damaged: {name} must be a number, got {value!r}"
                    )
                curves.setdefault(name, []).append((numbers["step"], value))
    if not curves:
        raise UsageError(f"--run {run}: {files[0]} has none of {', '.join(_NAMES)}")
    return curves


def record_curves(curves: Curves, recorder: Recorder) -> None:
    """Adds the curves. A long one is thinned to about `MAX_POINTS` evenly spaced points and the last one."""
    for name, points in curves.items():
        stride = -(-len(points) // MAX_POINTS)
        kept = points[::stride]
        if kept[-1] != points[-1]:
            kept.append(points[-1])
        for step, value in kept:
            recorder.add("curve", value, name=name, step=step)
