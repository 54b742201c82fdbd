"""Prints the tables of RESULTS.md with bos first, and draws results/sinks_training.png, from results/sinks/*.jsonl.

python docs/softpick/plot_sinks.py (needs the extra [dev])

The records are:

ARM-seedN.jsonl   of the run's metrics.jsonl, the validation loss and the measurements of ``--metrics.attention_freq``;
                  six digits of each number
analysis.jsonl    of each model's records.jsonl of flame.analyze, what is neither of a layer nor of a head; eight digits
lengths.jsonl     the same of a second analysis, at lengths beyond that of training
learning_rates.jsonl   validation losses of configs/sweeps/learning_rate_10M.toml; those of 2e-3 are the sweep's
35M/, 120M/       ARM-seedN.jsonl and analysis.jsonl of the larger models
35M/learning_rates.jsonl   of configs/sweeps/learning_rate.toml; those of 1e-3 are from sinks_35M.toml
T1024/            of configs/sweeps/sinks_T1024.toml: ARM-seedN.jsonl, those of softmax and two seeds of softpick to step
                  1,500 of 2,400, and analysis.jsonl
"""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from flame.analysis.interventions import NAMES
from flame.analysis.report.palette import FIXED
from flame.sweeps.report import fitted_minimum

FOLDER = Path(__file__).with_name("results")
SEEDS = (1, 2, 3)
STEPS = 2400
TRAINING_LENGTH = 256
# softmax first: the others are compared with it; then some of softpick's ingredients, then additions
ARMS = (
    *("softmax", "softpick"),
    *("rectified", "relu_softpick", "abs_softpick", "softmax_plus_one", "gpt_oss"),
    *("gated", "scaled_softpick", "scaled_softmax"),
)
# statistic while training -> title, factor, whether the axis is logarithmic
STATISTICS = {
    "sink_rate_0.3": ("sinks above 0.3, %", 100, False),
    "first_value_ratio": ("value norm of bos / others", 1, False),
    "largest_first_activation": ("largest activation at bos", 1, True),
    "kurtosis": ("kurtosis", 1, True),
}
# those that start, and whether the middle is that of logarithms
STARTING = {"sink_rate_0.3": False, "first_value_ratio": True, "largest_first_activation": True}
SINKS = {"eps": 0.3}


def columns(*lengths: int) -> dict[str, tuple[str, dict[str, Any], float, int]]:
    """Title -> metric, keys, factor, digits; the last length is that of training."""
    of_training = {"length": lengths[-1]}
    return {
        **{
            f"sinks at {n} tokens, %": ("sink_rate", SINKS | {"length": n}, 100, 1) for n in lengths
        },
        "value norm of bos / others, at 64": ("first_value_ratio", {"length": 64}, 1, 2),
        "largest activation": ("largest_activation", of_training, 1, 0),
        "kurtosis": ("kurtosis", of_training, 1, 0),
        "zeros, %": ("zeros", of_training, 100, 1),
        "row sum": ("row_sum", of_training, 1, 2),
        "dead heads, %": ("dead_head", of_training, 100, 1),
    }


COLUMNS = columns(16, 64, TRAINING_LENGTH)
# folder of results/sinks -> arms, seeds, steps; they were trained on 1,024 tokens
LARGER = {
    "35M": (("softmax", "softpick", "scaled_softpick", "gated"), (1, 2, 3), 1600),
    "120M": (("softmax", "softpick"), (1,), 3000),
}
LARGER_LENGTH = 1024
LARGER_COLUMNS = columns(16, 64, 256, LARGER_LENGTH) | {
    "kurtosis at 64": ("kurtosis", {"length": 64}, 1, 0)
}
# of sinks_T1024.toml: arms with three seeds, the last step whose records all of them have, and what was analysed when finished;
# of the last two arms one seed
T1024_ARMS = ("softmax", "softpick", "scaled_softpick")
T1024_LAST_STEP = 1500
T1024_ANALYSED = (*T1024_ARMS, "gated", "relu_softpick")

Record = dict[str, Any]


def read(name: str) -> list[Record]:
    """Records of a file of results/sinks."""
    return [json.loads(line) for line in (FOLDER / "sinks" / name).read_text().splitlines()]


def trained(arm: str) -> list[list[Record]]:
    """Records while training, by seed."""
    return [read(f"{arm}-seed{seed}.jsonl") for seed in SEEDS]


def values(records: list[Record], arm: str, metric: str, **keys: Any) -> dict[int, float]:
    """Seed -> value of a metric; seeds without a value are left out."""
    keys |= {"arm": arm, "metric": metric}
    found = (r for r in records if keys.items() <= r.items())
    return {r["seed"]: r["value"] for r in found if r["value"] is not None}


def at(records: list[Record], name: str, step: int) -> float:
    """Value of a statistic at a step of training."""
    return next(r[name] for r in records if r["step"] == step and name in r)


def curve(records: list[Record], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a statistic."""
    points = [(r["step"], r[name]) for r in records if name in r]
    steps, found = zip(*points, strict=True)
    return list(steps), list(found)


def start(records: list[Record], name: str) -> int:
    """The first step from which a statistic stays on the final side of the middle of its first and last value (H9)."""
    steps, found = curve(records, name)
    first, last = found[0], found[-1]
    middle = (first * last) ** 0.5 if STARTING[name] else (first + last) / 2
    is_final = [(x > middle) == (last > middle) for x in found]
    index = len(found)
    while index and is_final[index - 1]:
        index -= 1
    return int(steps[index])


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def header(*cells: str) -> None:
    row(*cells)
    row(*["---"] * len(cells))


def spread(found: Iterable[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    found = list(found)
    return f"{statistics.mean(found):.{digits}f} ± {statistics.stdev(found):.{digits}f}"


def each(found: Iterable[float], digits: int, sign: str = "") -> str:
    """The value of each seed."""
    return ", ".join(f"{x:{sign}.{digits}f}" for x in found)


def finished(analysis: list[Record]) -> None:
    header("arm", *COLUMNS, "validation loss")
    for arm in ARMS:
        cells = [
            spread((x * factor for x in values(analysis, arm, metric, **keys).values()), digits)
            for metric, keys, factor, digits in COLUMNS.values()
        ]
        losses = [at(records, "validation_loss", STEPS) for records in trained(arm)]
        row(arm, *cells, spread(losses, 3))
    print()


def kurtosis_ratios(analysis: list[Record], arm: str, length: int) -> list[float]:
    """Softmax's kurtosis over the arm's, by seed."""
    softmax, own = (
        values(analysis, name, "kurtosis", length=length).values() for name in ("softmax", arm)
    )
    return [a / b for a, b in zip(softmax, own, strict=True)]


def by_seed(analysis: list[Record]) -> None:
    """What the thresholds ask seed by seed."""
    header("arm", "sinks at 64 tokens, %", "softmax's kurtosis / the arm's", "loss gap")
    loss = {arm: [at(r, "validation_loss", STEPS) for r in trained(arm)] for arm in ARMS}
    for arm in ARMS:
        sinks = [100 * x for x in values(analysis, arm, "sink_rate", **SINKS, length=64).values()]
        ratios = kurtosis_ratios(analysis, arm, TRAINING_LENGTH)
        gaps = [a - b for a, b in zip(loss[arm], loss["softmax"], strict=True)]
        row(arm, each(sinks, 1), each(ratios, 1), f"{spread(gaps, 3)} ({each(gaps, 3, '+')})")
    print()


def starts() -> None:
    """When a signal starts (H9)."""
    header("arm, seed", *(f"{STATISTICS[name][0]}: starts at step" for name in STARTING))
    runs = {(arm, i): r for arm in ARMS for i, r in zip(SEEDS, trained(arm), strict=True)}
    for size, (arms, seeds, _) in LARGER.items():
        runs |= {(f"{size} {a}", i): read(f"{size}/{a}-seed{i}.jsonl") for a in arms for i in seeds}
    for (arm, seed), records in runs.items():
        row(f"{arm}, {seed}", *(f"{start(records, name):,}" for name in STARTING))
    print()


def interventions(
    analysis: list[Record], length: int, arms: tuple[str, ...] = ARMS, size: str = ""
) -> None:
    """Change of loss after each intervention, and softmax's sink rate before and after, by seed."""
    header(f"{size} at {length} tokens".strip(), *NAMES)
    found: dict[tuple[str, str], list[Record]] = {}
    for r in analysis:
        if r["metric"] == "intervention" and r["length"] == length:
            found.setdefault((r["arm"], r["name"]), []).append(r)
    for arm in arms:
        changes = (
            [r["value"] - r["before"] for r in found[arm, name] if r["value"] is not None]
            for name in NAMES
        )
        row(arm, *(each(x, 4, "+") or "no sink head" for x in changes))
    row(
        "softmax's sinks, %",
        *(
            ", ".join(
                f"{100 * r['sink_rate_before']:.0f} to {100 * r['sink_rate']:.0f}"
                for r in found["softmax", name]
            )
            for name in NAMES
        ),
    )
    print()


def saved_by_passkey(records: list[Record], arm: str, length: int, seed: int) -> float:
    """Loss of the key's digits where another key is planted less that where this key is, nats; mean over depths."""
    keys = {"arm": arm, "seed": seed, "metric": "passkey_loss", "length": length}
    found = [r for r in records if keys.items() <= r.items()]
    other, right = (
        statistics.mean(r["value"] for r in found if r["planted"] == planted)
        for planted in ("other_key", "with_key")
    )
    return other - right


def lengths() -> None:
    """Loss, row sum and what the right passkey saves against another one, at lengths beyond that of training."""
    records = read("lengths.jsonl")
    header("arm", "tokens", "loss", "loss gap", "row sum", "a passkey saves, nats")
    softmax: dict[int, dict[int, float]] = {}
    for arm in dict.fromkeys(r["arm"] for r in sorted(records, key=lambda r: ARMS.index(r["arm"]))):
        for length in (256, 1024, 4096):
            loss = values(records, arm, "loss", length=length)
            if arm == "softmax":
                softmax[length] = loss
            gaps = [x - softmax[length][seed] for seed, x in loss.items()]
            saved = [saved_by_passkey(records, arm, length, seed) for seed in loss]
            sums = values(records, arm, "row_sum", length=length).values()
            row(
                arm,
                f"{length:,}",
                each(loss.values(), 3),
                each(gaps, 3, "+"),
                each(sums, 2),
                each(saved, 1),
            )
    print()


def learning_rates(name: str, last_step: int) -> None:
    """Validation loss at each rate, and the minimum between the rates (H7, H11)."""
    records = [r for r in read(name) if r["step"] == last_step]
    rates = sorted({r["learning_rate"] for r in records})
    header("arm", *(f"{rate:g}" for rate in rates), "minimum", "at the rate")
    for arm in ("softmax", "softpick"):
        losses = {r["learning_rate"]: r["validation_loss"] for r in records if r["arm"] == arm}
        minimum = fitted_minimum(losses)
        rate, loss = minimum or (math.nan, math.nan)
        row(arm, *(f"{losses[x]:.4f}" for x in rates), f"{loss:.4f}", f"{rate:.2e}")
    print()


def cells_by_seed(
    analysis: list[Record], arm: str, columns: dict[str, tuple[str, dict[str, Any], float, int]]
) -> list[str]:
    """Cells of an arm, each with the value of every seed."""
    return [
        each((x * factor for x in values(analysis, arm, metric, **keys).values()), digits)
        for metric, keys, factor, digits in columns.values()
    ]


def trained_on_longer_sequences() -> None:
    """The shape of `finished`, trained on 1,024 tokens: while training by seed, then the models that were analysed."""
    header("while training", "sinks, %", "kurtosis", "largest activation")
    for arm in T1024_ARMS:
        runs = [read(f"T1024/{arm}-seed{seed}.jsonl") for seed in SEEDS]
        cells = (
            each((factor * at(r, name, T1024_LAST_STEP) for r in runs), digits)
            for name, factor, digits in (
                ("sink_rate_0.3", 100, 1),
                ("kurtosis", 1, 0),
                ("largest_activation", 1, 0),
            )
        )
        row(arm, *cells)
    print()
    columns = LARGER_COLUMNS | {"loss": ("loss", {"length": LARGER_LENGTH}, 1, 3)}
    header("finished", *columns)
    analysis = read("T1024/analysis.jsonl")
    for arm in T1024_ANALYSED:
        row(arm, *cells_by_seed(analysis, arm, columns))
    print()


def larger() -> None:
    """The larger models: every number seed by seed, and ratios and gaps to softmax of the same seed (H10)."""
    header("size, arm", *LARGER_COLUMNS, "softmax's kurtosis / the arm's", "loss", "loss gap")
    for size, (arms, seeds, steps) in LARGER.items():
        analysis = read(f"{size}/analysis.jsonl")
        loss = {
            arm: [at(read(f"{size}/{arm}-seed{i}.jsonl"), "validation_loss", steps) for i in seeds]
            for arm in arms
        }
        for arm in arms:
            cells = cells_by_seed(analysis, arm, LARGER_COLUMNS)
            ratios = kurtosis_ratios(analysis, arm, LARGER_LENGTH)
            gaps = [a - b for a, b in zip(loss[arm], loss["softmax"], strict=True)]
            row(f"{size}, {arm}", *cells, each(ratios, 1), each(loss[arm], 3), each(gaps, 3, "+"))
    print()


def draw() -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, len(STATISTICS), figsize=(13, 3.8))
    for axis, (name, (title, factor, is_log)) in zip(axes, STATISTICS.items(), strict=True):
        for arm in ARMS:
            curves = [curve(records, name) for records in trained(arm)]
            steps = curves[0][0]
            by_step = [
                [x * factor for x in of_step]
                for of_step in zip(*(c[1] for c in curves), strict=True)
            ]
            color = FIXED[arm].light
            is_main = arm in ("softmax", "softpick", "scaled_softpick")
            axis.plot(
                steps,
                [statistics.mean(x) for x in by_step],
                color=color,
                label=arm,
                linewidth=2.2 if is_main else 1,
            )
            if is_main:
                low, high = [min(x) for x in by_step], [max(x) for x in by_step]
                axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axis.set(title=f"{title} (log scale)" if is_log else title, xlabel="step")
        axis.set_yscale("log") if is_log else axis.set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="lower center", ncol=len(ARMS) // 2)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(FOLDER / "sinks_training.png", dpi=120)


def main() -> None:
    """Prints the tables and draws the picture."""
    analysis = read("analysis.jsonl")
    finished(analysis)
    by_seed(analysis)
    starts()
    for length in (64, TRAINING_LENGTH):
        interventions(analysis, length)
    lengths()
    learning_rates("learning_rates.jsonl", STEPS)
    learning_rates("35M/learning_rates.jsonl", LARGER["35M"][2])
    larger()
    trained_on_longer_sequences()
    for size, (arms, _, _) in LARGER.items():
        interventions(read(f"{size}/analysis.jsonl"), 64, arms, size)
    interventions(read("T1024/analysis.jsonl"), 64, T1024_ANALYSED, "T1024")
    draw()


if __name__ == "__main__":
    main()
