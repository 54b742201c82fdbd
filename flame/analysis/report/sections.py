"""The sections of the page: charts, maps and tables of one subject each."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from flame.analysis.records import Mean, Record, Results, mean_of
from flame.analysis.report import tables
from flame.analysis.report.bars import chart
from flame.analysis.report.elements import columns, figure, folded, grid, html_table
from flame.analysis.report.maps import color_bar, heat_map, triangle_map
from flame.analysis.report.palette import slots
from flame.analysis.report.svg import Axis, Line, line_chart, round_up

_STEP = Axis("step")


def _lines(
    results: Results,
    metric: str,
    x: Callable[[Record], float | None],
    *,
    factor: float = 1.0,
    **keys: Any,
) -> list[Line]:
    return [
        Line(slot, label, _scaled(results.series(metric, label, x, **keys), factor))
        for label, slot in slots(results.models).items()
    ]


def _scaled(points: dict[float, Mean], factor: float) -> dict[float, Mean]:
    return {x: mean.scaled(factor) for x, mean in points.items()}


def _layers(results: Results, first: int = 0) -> Axis:
    """Evenly spaced integers as ticks; ``first`` is -1 if the embedding counts as a layer."""
    last = max(r["layer"] for r in results.where("kurtosis") if r["layer"] is not None)
    ticks = [-1] * (first < 0) + list(range(0, last + 1, 1 + last // 8))
    return Axis("layer (−1: embedding)" if first < 0 else "layer", ticks=tuple(ticks))


def _by_length(
    results: Results,
    metric: str,
    y: Axis,
    show: Callable[[float], str] = tables.number,
    *,
    factor: float = 1.0,
    **keys: Any,
) -> str:
    keys |= {"layer": None, "head": None}
    lines = _lines(results, metric, lambda r: r["length"], factor=factor, **keys)
    return chart(lines, _length_axis(results, results.lengths), y, show)


def _by_or_at(results: Results, title: str, lengths: Sequence[int] = ()) -> str:
    """The title of a chart over ``lengths``, by default the measured ones, or of bars if there is one length alone."""
    first, *others = lengths or results.lengths
    return f"{title} by length" if others else f"{title}, {tables.tokens(results, first)}"


def _length_axis(results: Results, lengths: Sequence[int]) -> Axis:
    """The axis of lengths; a dashed line bounds those of training if there are longer ones."""
    label, trained = "length, tokens", results.training_length
    if trained is None or max(lengths) <= trained:
        return Axis(label, log=True, ticks=tuple(lengths))
    # the line needs a position on the axis
    mark = float(trained) if min(lengths) <= trained else None
    return Axis(f"{label} (trained at {trained:,})", log=True, ticks=tuple(lengths), mark=mark)


def summary(results: Results) -> str:
    """The paper's table, and the loss by length."""
    first, *others = results.lengths_to_show
    shown = f"<h3>At {tables.tokens(results, first)}</h3>" + html_table(
        tables.summary(results, first)
    )
    shown += folded(*(tables.summary(results, length) for length in others))
    shown += columns(tables.summary(results, first))
    loss = _by_length(results, "loss", Axis("loss, nats per token"), tables.loss)
    return shown + grid([figure(_by_or_at(results, "Loss"), "nats per token", loss)], results)


def sinks(results: Results) -> str:
    """Weight on key 0: rates by length, means by layer and by head."""
    figures = [
        figure(
            _by_or_at(results, title),
            f"% of (sample, layer, head) whose mean weight on key 0 exceeds {eps:g}",
            _by_length(
                results, metric, Axis("sink rate, %", low=0), tables.percent, factor=100, eps=eps
            ),
        )
        for metric, title in (
            ("sink_rate", "Sink rate"),
            ("late_sink_rate", "Sink rate of the later half of the queries"),
        )
        for eps in results.setup["sink_eps"]
    ]
    length = results.main_length
    tokens = tables.tokens(results, length)
    layers = _lines(
        results, "first_weight", lambda r: r["layer"], length=length, head=None, factor=1.0
    )
    drawing = line_chart(layers, _layers(results), Axis("mean weight on key 0", low=0))
    figures.append(figure("Weight on key 0 by layer", f"mean, {tokens}", drawing))
    ratios = _lines(results, "first_value_ratio", lambda r: r["layer"], length=length, head=None)
    drawing = line_chart(ratios, _layers(results), Axis("norm, first token / others", low=0))
    figures.append(
        figure("Value norm of the first token by layer", f"mean over heads, {tokens}", drawing)
    )
    maps, values = [], {}
    for label in results.labels:
        seeds: dict[int, dict[int, list[float]]] = {}
        for r in results.where("first_weight", label=label, length=length):
            if r["head"] is not None:
                seeds.setdefault(r["layer"], {}).setdefault(r["head"], []).append(r["value"])
        values[label] = [
            [mean_of(seeds[i][j]).mean for j in sorted(seeds[i])]  # pyright: ignore[reportOptionalMemberAccess]  # each head has at least one value, so no mean is None
            for i in sorted(seeds)
        ]
    # a scale up to 1 would show models without sinks in one shade, one below 0.1 would show their noise as dark
    cells = [v for rows in values.values() for row in rows for v in row if math.isfinite(v)]
    largest = max(cells, default=0.0)
    most = min(1.0, round_up(max(largest, 0.1)))
    for label, rows in values.items():
        what = f"mean weight on key 0 by layer and head, {label}"
        maps.append(figure(label, "", heat_map(rows, "layer", "head", what, most)))
    bar = color_bar({0: "0", 0.5: f"{most / 2:g}", 1: f"{most:g}"}, "mean weight on key 0")
    return (
        "<p>A head that puts its weight on the first key, whatever that is, is a sink.</p>"
        + grid(figures, results)
        + f"<h3>Mean weight on key 0 by layer and head, {tokens}</h3>{bar}"
        + grid(maps, None, "maps")
        + folded(*(tables.sinks(results, n) for n in results.lengths_to_show))
        + columns(tables.sinks(results, length))
    )


def activations(results: Results) -> str:
    """Massive activations and kurtosis."""
    length, axis = results.main_length, _layers(results, first=-1)
    tokens, lines = tables.tokens(results, length), []
    for label, slot in slots(results.models).items():
        # the larger absolute value of a model's minimum and maximum
        sides = {
            (r["model"], r["layer"]): 0.0
            for r in results.where("max", label=label, length=length)
            if r["layer"] is not None
        }
        for metric in ("min", "max"):
            for r in results.where(metric, label=label, length=length):
                if r["layer"] is not None:
                    key = r["model"], r["layer"]
                    value = math.nan if r["value"] is None else abs(r["value"])
                    sides[key] = max(value, sides[key])
        layers = sorted({layer for _, layer in sides})
        points = {n: mean_of(v for (_, x), v in sides.items() if x == n) for n in layers}
        lines.append(Line(slot, label, points))  # pyright: ignore[reportArgumentType]  # each layer has at least one value, so no point is None
    magnitude = line_chart(lines, axis, Axis("largest |activation|", log=True))
    by_layer = _lines(results, "kurtosis", lambda r: r["layer"], length=length, head=None)
    kurtosis = line_chart(by_layer, axis, Axis("kurtosis", log=True))
    by_layer = _lines(
        results, "top_channel_energy", lambda r: r["layer"], length=length, factor=100
    )
    energy = line_chart(by_layer, axis, Axis("%", low=0))
    figures = [
        figure("Largest |activation| by layer", f"of the layer's output, {tokens}", magnitude),
        figure("Kurtosis by layer", f"3 for a normal distribution, {tokens}", kurtosis),
        figure(
            "Energy in the largest channel by layer",
            f"% of the sum of squares, {tokens}",
            energy,
        ),
        figure(
            _by_or_at(results, "Kurtosis"),
            "embedding and all layers pooled",
            _by_length(results, "kurtosis", Axis("kurtosis", log=True)),
        ),
    ]
    return (
        "<p>Massive activations: a few channels of a few tokens, often the first, that are far larger than the rest.</p>"
        + grid(figures, results)
        + folded(tables.extremes(results, length))
        + columns(tables.extremes(results, length))
    )


def interventions(results: Results) -> str:
    """The tables of `--interventions`; "" if they were not measured."""
    parts, shown = [], []
    for length in results.lengths_to_show:
        for table in tables.interventions(results, length):
            shown.append(table)
            parts.append(
                f"<h3>{escape(table.title)}</h3>{html_table(table)}<p>{escape(table.note)}</p>"
            )
    return "".join(parts) + columns(*shown)


def weights(results: Results) -> str:
    """Zeros, sums of rows and their largest weight, entropy, dead heads."""
    length = results.main_length
    tokens = tables.tokens(results, length)
    ticks = tuple(4**n for n in range(12) if 4**n < length)
    position = Axis("query position (0 as 0.5)", log=True, ticks=ticks)

    def middle(r: Record) -> float:
        # the geometric mean of a bucket's bounds; position 0 has no logarithm
        start, end = r["position_start"], r["position_end"] - 1
        return math.sqrt(start * end) if start else 0.5

    keys = {"length": length, "layer": None, "head": None}
    sums = _lines(results, "row_sum_at", middle, **keys)
    tops = _lines(results, "top_weight_at", middle, **keys)
    share = Axis("%", low=0, high=100)
    figures = [
        figure(
            _by_or_at(results, "Exact zeros"),
            "% of the weights of the lower triangle",
            _by_length(results, "zeros", share, tables.percent, factor=100),
        ),
        *(
            figure(
                _by_or_at(results, f"Weights up to {eps:g}"),
                "% of the lower triangle",
                _by_length(results, "at_most", share, tables.percent, factor=100, eps=eps),
            )
            for eps in results.setup["sparsity_eps"]
        ),
        figure(
            "Sum of a row by position",
            f"mean over heads, {tokens}",
            line_chart(sums, position, Axis("sum of weights", low=0, high=1)),
        ),
        figure(
            "Top weight by position",
            f"largest of a row, mean over heads, {tokens}",
            line_chart(tops, position, Axis("weight", low=0, high=1)),
        ),
        figure(
            _by_or_at(results, "Entropy"),
            "of normalised rows that have weight, nats",
            _by_length(results, "entropy", Axis("entropy, nats", low=0)),
        ),
        figure(
            _by_or_at(results, "Rows without any weight"),
            "% of (query, head)",
            _by_length(results, "empty_rows", Axis("%", low=0), tables.percent, factor=100),
        ),
        figure(
            _by_or_at(results, "Dead heads"),
            "% of heads whose output is below 1e-6 for over 95 % of tokens",
            _by_length(results, "dead_head", Axis("%", low=0), tables.percent, factor=100),
        ),
    ]
    return (
        "<p>Underscoring: each unwanted key adds to the denominator, so sums and top weights fall with the "
        "position.</p>"
        + grid(figures, results)
        + folded(*(tables.attention(results, n) for n in results.lengths_to_show))
        + columns(tables.attention(results, length))
    )


def maps(results: Results) -> str:
    """Attention maps of a few heads."""
    groups: dict[tuple[int, int], list[Record]] = {}
    for r in results.where("attention_map"):
        groups.setdefault((r["layer"], r["head"]), []).append(r)
    if not groups:
        return ""
    any_map = next(iter(groups.values()))[0]
    length, size = any_map["length"], any_map["tokens_in_cell"]
    pooled = f", a cell {size} × {size} tokens" if size > 1 else ""
    parts = [
        f"<p>One sequence of {length:,} tokens, the same for all models{pooled}. A cell's shade is the weight that a query "
        "of its rows puts on the keys of its columns; blank is exactly 0. The first model of each arm.</p>",
        color_bar(
            {0: "0", math.sqrt(0.05): ".05", 0.5: ".25", math.sqrt(0.5): ".5", 1: "1"},
            "weight on the keys of a cell",
        ),
    ]
    for (layer, head), records in groups.items():
        figures = []
        for r in records:
            what = f"attention of layer {layer}, head {head}, {r['label']}"
            unit = f"{tables.number(r['value'])} on key 0"
            figures.append(figure(r["label"], unit, triangle_map(r["map"], length, what)))
        parts.append(f"<h3>Layer {layer}, head {head}: {escape(records[0]['chosen'])}</h3>")
        parts.append(grid(figures, None, "maps"))
    return "".join(parts)


def training(results: Results) -> str:
    """Training curves; "" without any."""
    names = list(dict.fromkeys(r["name"] for r in results.where("curve")))
    # losses last long: the first steps would press the rest flat
    units = {"loss": "nats per token", "validation_loss": "nats per token"}
    names_of_activations = ("kurtosis", "largest_activation", "largest_first_activation")
    logs = (
        *("loss", "validation_loss", "grad_norm"),
        *(f"attention/{statistic}" for statistic in names_of_activations),
    )
    figures = []
    for name in names:
        lines = _lines(results, "curve", lambda r: r["step"], name=name)
        drawing = line_chart(lines, _STEP, Axis(name, log=name in logs))
        title = name.removeprefix("attention/").replace("_", " ")
        figures.append(
            figure(f"{title[0].upper()}{title[1:]} by step", units.get(name, ""), drawing)
        )
    return grid(figures, results)


def robustness(results: Results) -> str:
    """Quantised weights and passkeys; "" if they were not measured."""
    parts = []
    table = tables.quantized(results)
    if table is not None:
        records = [r for r in results.where("perplexity") if "bits" in r]
        length, bits = max(r["length"] for r in records), sorted({r["bits"] for r in records})
        keys = {"length": length, "layer": None, "head": None}
        # unquantised weights are drawn last, as 32 bits
        lines = _lines(results, "perplexity", lambda r: r.get("bits", 32), **keys)
        ticks = (*bits, 32)
        drawing = line_chart(
            lines, Axis("bits per weight", log=True, ticks=ticks), Axis("perplexity", log=True)
        )
        parts.append(f"<h3>{escape(table.title)}</h3>" + html_table(table))
        parts.append(grid([figure("Perplexity by bits", "", drawing)], results))
    found = [t for t in (tables.passkey(results), tables.passkey_losses(results)) if t is not None]
    if found:
        lengths = tuple(sorted({r["length"] for r in results.where("passkey")}))
        axis = _length_axis(results, lengths)
        share = Axis("retrieved, %", low=0, high=100)
        shares = chart(_by_depths(results, "passkey", 100), axis, share, tables.percent)
        keyed = _by_depths(results, "passkey_loss", planted="with_key")
        costs = chart(keyed, axis, Axis("nats", low=0), tables.number)
        note = "nats, the key in the text; a guess costs ln 90000 = 11.4"
        figures = [
            figure(
                _by_or_at(results, "Passkeys retrieved", lengths), "%, mean over depths", shares
            ),
            figure(_by_or_at(results, "Loss of the key's digits", lengths), note, costs),
        ]
        parts.append("<h3>Passkeys</h3>" + grid(figures, results))
        parts.append(folded(*found))
    return "".join(parts)


def _by_depths(results: Results, metric: str, factor: float = 1.0, **keys: Any) -> list[Line]:
    return [
        Line(slot, label, _scaled(tables.over_depths(results, metric, label, **keys), factor))
        for label, slot in slots(results.models).items()
    ]
