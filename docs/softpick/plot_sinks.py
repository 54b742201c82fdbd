"""Prints the tables of RESULTS.md with bos first, and draws results/sinks_training.png, from results/sinks/*.jsonl.

python docs/softpick/plot_sinks.py (needs the extra [dev])

The records are those of the runs' metrics.jsonl that hold a validation loss, or a measurement of
``--metrics.attention_freq`` with six digits of each number.
"""

import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = Path(__file__).with_name("results")
COLORS = {"softmax": "#999999", "softpick": "#c0392b"}
STEPS = 2400
# the last measurement that every run reached
COMMON_STEP = 800
# statistic -> title, factor, whether the axis is logarithmic
STATISTICS = {
    "sink_rate_0.3": ("sinks above 0.3, %", 100, False),
    "first_value_ratio": ("value norm of bos / others", 1, False),
    "largest_first_activation": ("largest activation at bos", 1, True),
    "kurtosis": ("kurtosis", 1, True),
}
# those that start, and whether the middle is that of logarithms
STARTING = {"sink_rate_0.3": False, "first_value_ratio": True, "largest_first_activation": True}

Record = dict[str, float]


def runs() -> dict[str, list[list[Record]]]:
    """Arm -> records of each of its seeds."""
    found: dict[str, list[list[Record]]] = {}
    for file in sorted((FOLDER / "sinks").glob("*.jsonl")):
        arm = file.name.partition("-seed")[0]
        records = [json.loads(line) for line in file.read_text().splitlines()]
        found.setdefault(arm, []).append(records)
    return found


def at(records: list[Record], name: str, step: int) -> float:
    """Value of a statistic at a step."""
    return next(r[name] for r in records if r["step"] == step and name in r)


def curve(records: list[Record], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a statistic."""
    points = [(r["step"], r[name]) for r in records if name in r]
    steps, values = zip(*points, strict=True)
    return list(steps), list(values)


def start(records: list[Record], name: str) -> int:
    """The first step from which a statistic stays on the final side of the middle of its first and last value (H9)."""
    steps, values = curve(records, name)
    first, last = values[0], values[-1]
    middle = (first * last) ** 0.5 if STARTING[name] else (first + last) / 2
    is_final = [(x > middle) == (last > middle) for x in values]
    index = len(values)
    while index and is_final[index - 1]:
        index -= 1
    return int(steps[index])


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(arms: dict[str, list[list[Record]]], step: int) -> None:
    row("arm", *(title for title, _, _ in STATISTICS.values()), "zeros, %", "loss")
    row(*["---"] * (len(STATISTICS) + 3))
    for arm, seeds in arms.items():
        cells = []
        for name, (_, factor, _) in (STATISTICS | {"zeros": ("", 100, False)}).items():
            digits = 0 if name in ("kurtosis", "largest_first_activation") else 1
            digits = 2 if name == "first_value_ratio" else digits
            cells.append(spread([at(records, name, step) * factor for records in seeds], digits))
        cells.append(spread([at(records, "validation_loss", step) for records in seeds], 3))
        row(arm, *cells)
    print()


def starts(arms: dict[str, list[list[Record]]]) -> None:
    row("arm, seed", *(f"{STATISTICS[name][0]}: starts at step" for name in STARTING))
    row(*["---"] * (len(STARTING) + 1))
    for arm, seeds in arms.items():
        for number, records in enumerate(seeds, start=1):
            row(f"{arm}, {number}", *(str(start(records, name)) for name in STARTING))
    print()


def draw(arms: dict[str, list[list[Record]]]) -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, len(STATISTICS), figsize=(13, 3.2))
    for axis, (name, (title, factor, is_log)) in zip(axes, STATISTICS.items(), strict=True):
        for arm, seeds in arms.items():
            for number, records in enumerate(seeds):
                steps, values = curve(records, name)
                label = None if number else f"{arm}, 3 seeds"
                axis.plot(steps, [x * factor for x in values], color=COLORS[arm], label=label)
        axis.set(title=f"{title} (log scale)" if is_log else title, xlabel="step")
        axis.set_yscale("log") if is_log else axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False, loc="upper left")
    figure.tight_layout()
    figure.savefig(FOLDER / "sinks_training.png", dpi=120)


def main() -> None:
    """Prints the tables and draws the picture."""
    arms = runs()
    finished = {arm: seeds for arm, seeds in arms.items() if arm in COLORS}
    table(finished, STEPS)
    starts(finished)
    table(arms, COMMON_STEP)
    draw(finished)


if __name__ == "__main__":
    main()
