"""The rows of `bench_attn.py`, and its picture."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True, slots=True)
class Result:
    """One operator at one shape."""

    operator: str
    B: int
    T: int
    HQ: int
    H: int
    D: int
    forward_ms: float
    forward_spread_ms: float
    forward_tflops: float
    backward_ms: float
    backward_spread_ms: float
    backward_tflops: float
    peak_mib: float


def plot(results: list[Result], operators: list[str], path: Path, title: str) -> None:
    """Speed of forward and backward, and memory, against T; a row of panels for each head dimension and group."""
    import matplotlib.pyplot as plt

    palette = plt.get_cmap("tab10").colors
    others = (name for name in operators if name != "softpick")
    # red is softpick in every picture of the project
    colors = dict(zip(others, palette[:3] + palette[4:], strict=False)) | {"softpick": palette[3]}
    kinds = sorted({(r.D, r.HQ, r.H) for r in results}, key=lambda x: (x[0], x[1] // x[2]))
    figure, axes = plt.subplots(
        len(kinds), 3, figsize=(13, 3.4 * len(kinds)), squeeze=False, layout="constrained"
    )
    columns = (
        ("forward_tflops", "forward, TFLOP/s"),
        ("backward_tflops", "backward, TFLOP/s"),
        ("peak_mib", "peak memory, MiB"),
    )
    for (D, HQ, H), row in zip(kinds, axes, strict=True):
        for (field, label), ax in zip(columns, row, strict=True):
            for name in operators:
                points = sorted(
                    (r.T, getattr(r, field))
                    for r in results
                    if (r.operator, r.D, r.HQ, r.H) == (name, D, HQ, H)
                )
                if points:
                    ax.plot(
                        *zip(*points, strict=True),
                        "o-",
                        label=name,
                        markersize=3,
                        color=colors[name],
                        zorder=2 + (name == "softpick"),
                    )
            ax.set(
                xscale="log",
                xlabel="T",
                ylabel=label,
                title=f"D {D}, {HQ} query heads, {H} key heads",
            )
            ax.set_xticks(sorted({r.T for r in results}), sorted({r.T for r in results}))
            ax.set_ylim(0, 1.08 * ax.dataLim.ymax)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
    # a row may lack an operator that failed there
    drawn = {
        label: handle
        for ax in axes.flat
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in operators if name in drawn]
    figure.legend([drawn[name] for name in names], names, loc="outside lower center", ncols=5)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
