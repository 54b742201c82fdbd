"""What a report says at a glance: each arm against the first, in loss, sinks, massive activations and sparsity."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flame.analysis.records import Mean, Results, mean_of
from flame.analysis.report.cells import Table, cell, loss, number, percent
from flame.analysis.report.tables import KURTOSIS, SINK, ZEROS

PREFERRED_SINK_EPS = 0.3
_NAMES_AT_MOST = 3
"""Longest list of arms in a sentence; more are counted."""


@dataclass(frozen=True)
class Question:
    """A metric that the report opens with."""

    title: str
    column: str
    metric: str
    show: Callable[[float], str]
    value: str
    """A value in words, with ``{}`` for the number."""
    unit: str = ""
    """Unit of a difference, after a blank."""
    factor: float = 1.0
    eps: float | None = None
    meaning: str = ""


class Gap(NamedTuple):
    """Difference of an arm to the first one."""

    mean: float
    std: float | None
    """None if an arm has one seed."""
    is_paired: bool
    """Whether ``std`` is that of the differences seed by seed."""
    is_partial: bool
    """Whether one of the arms has seeds that the difference leaves out, since the other lacks them."""

    @property
    def is_within(self) -> bool:
        """Whether the difference does not exceed its spread."""
        return self.std is not None and abs(self.mean) <= self.std


def _short(x: float) -> str:
    return number(x, digits=3)


def questions(results: Results) -> list[Question]:
    """The metrics of the sentences; sinks by the threshold that is nearest to `PREFERRED_SINK_EPS`."""
    eps = min(results.setup["sink_eps"], key=lambda x: abs(x - PREFERRED_SINK_EPS))
    return [
        Question("Loss", "loss", "loss", loss, "{} nats per token", meaning="nats per token"),
        Question(
            *("Sinks", "sinks %", "sink_rate", percent, f"{{}} % of heads above {eps:g}"),
            *(" points", 100, eps, SINK.format(eps)),
        ),
        Question(
            *("Massive activations", "kurtosis", "kurtosis", _short, "kurtosis {}"),
            meaning=KURTOSIS,
        ),
        Question(
            *("Sparsity", "zeros %", "zeros", percent, "{} % exact zeros", " points", 100),
            meaning=ZEROS,
        ),
    ]


def gap(results: Results, question: Question, label: str, length: int) -> Gap | None:
    """Difference of an arm to the first one; None if one of them was not measured.

    It is taken seed by seed if the arms share two seeds, or the only seed of one of them, since the effect of a seed on
    both arms cancels. Else its spread is the root of the sum of both variances.
    """
    values = [_values(results, question, x, length) for x in (label, results.labels[0])]
    if not all(values):
        return None
    by_seed = [
        _by_seed(results, x, v) for x, v in zip((label, results.labels[0]), values, strict=True)
    ]
    common = [seed for seed in by_seed[0] if seed in by_seed[1]]
    if len(common) >= min(2, *map(len, values)):
        found = mean_of(by_seed[0][seed] - by_seed[1][seed] for seed in common)
        is_paired, is_partial = True, any(len(x) > len(common) for x in values)
    else:
        arm, first = (mean_of(x.values()) for x in values)
        assert arm is not None
        assert first is not None
        has_spread = arm.std is not None and first.std is not None
        std = math.hypot(arm.std, first.std) if has_spread else None  # pyright: ignore[reportArgumentType]  # neither is None
        found, is_paired, is_partial = Mean(arm.mean - first.mean, std, 0), False, False
    assert found is not None
    found = found.scaled(question.factor)
    return Gap(found.mean, found.std, is_paired, is_partial)


def _values(results: Results, question: Question, label: str, length: int) -> dict[str, float]:
    """Model -> its value; NaN if it is not finite."""
    keys = {"label": label, "length": length, "layer": None, "head": None, "eps": question.eps}
    records = results.where(question.metric, **keys)
    return {r["model"]: math.nan if r["value"] is None else r["value"] for r in records}


def _by_seed(results: Results, label: str, values: dict[str, float]) -> dict[int, float]:
    """Seed -> value; empty if a seed is unknown or occurs twice."""
    seeds = {r["model"]: r.get("seed") for r in results.models if r["label"] == label}
    found = {
        seed: values[model] for model, seed in seeds.items() if model in values and seed is not None
    }
    return found if len(found) == len(values) else {}


def _mean(results: Results, question: Question, label: str, length: int) -> Mean | None:
    mean = results.of_model(question.metric, label, length, eps=question.eps)
    return None if mean is None else mean.scaled(question.factor)


def _size(found: Gap, question: Question) -> str:
    """Absolute difference and spread."""
    if not math.isfinite(found.mean):
        return "not finite"
    return cell(Mean(abs(found.mean), found.std, 0), question.show)


def _signed(found: Gap, question: Question) -> str:
    if not math.isfinite(found.mean):
        return "not finite"
    return ("−" if found.mean < 0 else "+") + _size(found, question)


def sentences(results: Results) -> list[tuple[str, str]]:
    """Title and sentence of each question."""
    length = results.main_length
    first, *others = results.labels
    said = []
    for question in questions(results):
        base = _mean(results, question, first, length)
        gaps = {x: g for x in others if (g := gap(results, question, x, length)) is not None}
        if base is None:
            continue
        if not gaps:
            text = f"{first} {question.value.format(question.show(base.mean))}"
        elif len(others) == 1:
            value = _mean(results, question, others[0], length)
            text = _of_two(question, others[0], value, first, base, gaps[others[0]])  # pyright: ignore[reportArgumentType]  # there is a gap, so there is a value
        else:
            text = _of_many(question, first, base, gaps)
        said.append((question.title, text + "."))
    return said


def _of_two(question: Question, label: str, value: Mean, first: str, base: Mean, found: Gap) -> str:
    own = question.value.format(question.show(value.mean))
    other = question.show(base.mean)
    if not math.isfinite(found.mean):
        return f"{label} {own}, {first} {other}"
    hint = "; one seed, a hint" if found.std is None else ""
    if found.mean == 0 and not found.std:
        return f"{label} {own}, the same as {first}{hint}"
    side = "above" if found.mean > 0 else "below" if found.mean < 0 else "from"
    within = ", within the spread" if found.is_within else ""
    partial = "; over the seeds that both have" if found.is_partial else ""
    size = f"{_size(found, question)}{question.unit}"
    return f"{label} {own}, {size} {side} {first} ({other}){within}{hint}{partial}"


def _of_many(question: Question, first: str, base: Mean, gaps: dict[str, Gap]) -> str:
    """The extremes; the arms within the spread and those with one seed are named if few, else counted."""
    against = f"{first} {question.value.format(question.show(base.mean))}"
    finite = {x: g for x, g in gaps.items() if math.isfinite(g.mean)}
    broken = [x for x in gaps if x not in finite]
    hints = [x for x, g in finite.items() if g.std is None]
    within = [x for x, g in finite.items() if g.is_within]
    parts = []
    if finite and len(within) == len(finite):
        most = max(finite, key=lambda x: abs(finite[x].mean))
        parts.append(
            f"every arm within the spread, {most} farthest, {_signed(finite[most], question)}{question.unit}"
        )
    elif finite:
        ordered = sorted(finite, key=lambda x: finite[x].mean)
        extremes = {ordered[0]: "lowest ", ordered[-1]: "highest " if len(ordered) > 1 else ""}
        for label, word in extremes.items():
            # what is within the spread, or zero, is no difference
            if label not in within and finite[label].mean:
                parts.append(f"{word}{label}, {_signed(finite[label], question)}{question.unit}")
        if within:
            parts.append(f"within the spread: {_listed(within, gaps)}")
    if hints:
        whose = "" if len(hints) == len(finite) else f": {_listed(hints, gaps)}"
        parts.append(f"one seed, a hint{whose}")
    if broken:
        parts.append(f"not finite: {_listed(broken, gaps)}")
    return f"{against}; {'; '.join(parts)}"


def _listed(labels: Sequence[str], gaps: dict[str, Any]) -> str:
    return ", ".join(labels) if len(labels) <= _NAMES_AT_MOST else f"{len(labels)} of {len(gaps)}"


def table(results: Results) -> Table:
    """Every arm: its mean, and in brackets its difference to the first one."""
    length = results.main_length
    first = results.labels[0]
    asked = questions(results)
    largest = Question(
        *("", "largest activation", "largest_activation", _short, ""),
        meaning="largest absolute value of a layer's output",
    )
    # older records lack it
    asked += [largest] if results.where("largest_activation", length=length) else []
    rows = []
    for label in results.labels:
        cells = [label]
        for question in asked:
            found = None if label == first else gap(results, question, label, length)
            mean = _mean(results, question, label, length)
            if found is None or mean is None:
                cells.append(cell(mean, question.show))
                continue
            mark = " ?" if found.std is None else " ≈" if found.is_within else ""
            cells.append(f"{question.show(mean.mean)} ({_signed(found, question)}{mark})")
        rows.append(cells)
    meanings = {question.column: question.meaning for question in asked}
    return Table("Every arm", ["arm", *meanings], rows, note(results), meanings)


def note(results: Results) -> str:
    """What the brackets and signs of the table mean, and how the spread of a difference is taken."""
    first, *others = results.labels
    if not others:
        return ""
    length = results.main_length
    gaps = [gap(results, q, x, length) for q in questions(results) for x in others]
    spread = [g for g in gaps if g is not None and g.std is not None]
    text = [f"In brackets: the difference to {first}."]
    if any(g.is_paired for g in spread):
        text.append("± is the standard deviation of the differences seed by seed.")
    if not all(g.is_paired for g in spread):
        which = "Of arms whose seeds do not match, it" if len(text) > 1 else "±"
        text.append(f"{which} is the root of the sum of both arms' variances over seeds.")
    if any(g is not None and g.is_partial for g in gaps):
        text.append("A difference is over the seeds that both arms have, a mean over all seeds.")
    text += ["≈: within that spread."] if spread else []
    text += ["?: one seed, a hint."] if len(spread) < len(gaps) else []
    return " ".join(text)


def lead(results: Results) -> str:
    """At which length the sentences hold, and of how many seeds."""
    length = results.main_length
    trained = results.training_length
    relation = (
        "training length unknown"
        if trained is None
        else "the training length"
        if length == trained
        else f"trained at {trained:,}"
    )
    counts = sorted({sum(r["label"] == x for r in results.models) for x in results.labels})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    arms = f"{len(results.labels)} arm" + "s" * (len(results.labels) > 1)
    return f"{arms}, {seeds} seed{'s' * (counts[-1] > 1)} each, at {length:,} tokens ({relation})"
