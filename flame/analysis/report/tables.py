"""The tables of a report as cells of text, for `report.md` and the page."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flame.analysis.records import Mean, Results, mean_of
from flame.analysis.report.cells import Table, cell, loss, number, percent


@dataclass(frozen=True)
class _Column:
    title: str
    metric: str
    show: Callable[[float], str]
    factor: float = 1.0
    keys: dict[str, Any] = field(default_factory=dict)
    meaning: str = ""


SINK = "share of (sample, layer, head) whose mean weight on key 0 exceeds {:g}"
ZEROS = "share of the visible weights that are exactly 0"
KURTOSIS = "of the outputs of embedding and all layers, pooled; 3 for a normal distribution"
_DEAD = "share of heads whose output is below 1e-6 for "
_FIRST_WEIGHT = "mean weight of a query on key 0"
_ROW_SUM = "mean sum of a query's weights; 1 for softmax"


def _columns(results: Results) -> list[_Column]:
    sinks, small = results.setup["sink_eps"], results.setup["sparsity_eps"]
    upto = "share of the visible weights up to {:g}, zeros included"
    return [
        _Column("loss", "loss", loss, meaning="mean negative log-likelihood, nats per token"),
        # only the unquantised model
        _Column("ppl", "perplexity", number, 1, {"bits": None}, "exponential of the loss"),
        *(
            _Column(f"sink % >{e:g}", "sink_rate", percent, 100, {"eps": e}, SINK.format(e))
            for e in sinks
        ),
        _Column("kurtosis", "kurtosis", number, meaning=KURTOSIS),
        _Column("min", "min", number, meaning="smallest value that a layer puts out"),
        _Column("max", "max", number, meaning="largest value that a layer puts out"),
        _Column("zeros %", "zeros", percent, 100, {}, ZEROS),
        *(_Column(f"≤{e:g} %", "at_most", percent, 100, {"eps": e}, upto.format(e)) for e in small),
        _Column("dead %", "dead_head", percent, 100, {}, _DEAD + "over 95 % of the tokens"),
        _Column("dead everywhere %", "dead_everywhere", percent, 100, {}, _DEAD + "all tokens"),
        _Column(
            *("dormant %", "dormant_head", percent, 100, {}),
            "share of heads with a weight on key 0 above 0.9 for over 95 % of the tokens",
        ),
    ]


_ATTENTION = [
    _Column("weight on key 0", "first_weight", number, meaning=_FIRST_WEIGHT),
    _Column("sum of a row", "row_sum", number, meaning=_ROW_SUM),
    _Column("top weight", "top_weight", number, meaning="mean largest weight of a query"),
    _Column("entropy, nats", "entropy", number, meaning="of rows divided by their sum"),
    _Column(
        *("rows without weight %", "empty_rows", percent, 100, {}),
        "share of (query, head) without any weight",
    ),
    _Column("largest score", "max_score", number, meaning="largest scale * <q, k>"),
    _Column("largest output", "largest_output", number, meaning="of a head, absolute"),
]


def _by_label(results: Results, title: str, columns: list[_Column], length: int) -> Table:
    rows = []
    for label in results.labels:
        seeds = sum(r["label"] == label for r in results.models)
        means = [results.of_model(c.metric, label, length, **c.keys) for c in columns]
        cells = [cell(m, c.show, c.factor) for m, c in zip(means, columns, strict=True)]
        rows.append([label, str(seeds), *cells])
    meanings = {"seeds": "models of the arm; their mean is shown"}
    meanings |= {c.title: c.meaning for c in columns}
    return Table(title, ["arm", *meanings], rows, meanings=meanings)


def tokens(results: Results, length: int) -> str:
    """A length, and whether it is beyond that of training."""
    is_beyond = results.training_length is not None and length > results.training_length
    return f"{length:,} tokens" + " (beyond the training length)" * is_beyond


def summary(results: Results, length: int) -> Table:
    """The paper's table at one length."""
    return _by_label(results, tokens(results, length), _columns(results), length)


def attention(results: Results, length: int) -> Table:
    """Further attention metrics at one length: means over heads, or maxima for the largest score and output."""
    return _by_label(results, f"Attention at {tokens(results, length)}", _ATTENTION, length)


def sinks(results: Results, length: int) -> Table:
    """What shows sinks and massive activations at one length."""
    rates = [
        _Column(
            *(f"sink % >{eps:g}, {queries}", metric, percent, 100, {"eps": eps}),
            f"{SINK.format(eps)}; {of}",
        )
        for eps in results.setup["sink_eps"]
        for metric, queries, of in (
            ("sink_rate", "all queries", "mean over all queries"),
            ("late_sink_rate", "later half", "mean over the later half of the queries"),
        )
    ]
    later = "the same, over the later half of the queries"
    ratio = "norm of the value of token 0 over the mean norm of the other values, mean over samples"
    energy = "share of the sum of squares that lies in the channel with most of it"
    hidden = "of transformers' hidden_states, as the authors' script pools them"
    columns = [
        *rates,
        _Column("weight on key 0", "first_weight", number, meaning=_FIRST_WEIGHT),
        _Column("later half", "late_first_weight", number, meaning=later),
        _Column("value norm, first token / others", "first_value_ratio", number, meaning=ratio),
        _Column("sum of a row", "row_sum", number, meaning=_ROW_SUM),
        _Column(
            *("largest absolute activation", "largest_activation", number),
            meaning="largest absolute value that a layer puts out",
        ),
        _Column(
            *("at position 0", "largest_activation_at_first", number),
            meaning="the same, at the first token alone",
        ),
        _Column("energy in top channel %", "top_channel_energy", percent, 100, {}, energy),
        _Column("kurtosis", "kurtosis", number, meaning=KURTOSIS),
        _Column("kurtosis of hidden_states", "kurtosis_hidden_states", number, meaning=hidden),
    ]
    return _by_label(
        results, f"Sinks and activations at {tokens(results, length)}", columns, length
    )


EXTREMES = {
    "min": "min",
    "max": "max",
    "largest_activation": "largest absolute",
    "largest_activation_at_first": "largest absolute at position 0",
}
"""Metric -> its name in the table."""


def extremes(results: Results, length: int) -> Table:
    """Layer, position, channel and token of the extreme activations of each model."""
    rows = []
    for model in results.models:
        for metric, name in EXTREMES.items():
            keys = {"model": model["model"], "label": model["label"], "layer": None}
            for r in results.where(metric, length=length, **keys):
                where = [str(r[key]) for key in ("in_layer", "sample", "position", "channel")]
                # older records lack the token
                token = f"{r['token']} {r['token_text']}" if "token" in r else "–"
                value = "not finite" if r["value"] is None else number(r["value"])
                rows.append([f"{model['label']}, {model['model']}", name, value, *where, token])
    title = f"Where the extremes are, {tokens(results, length)} (layer −1: embedding)"
    header = ["model", "", "value", "layer", "sample", "position", "channel", "token"]
    meanings = {"layer": "whose output it is in; −1: the embedding", "token": "id and text"}
    return Table(title, header, rows, meanings=meanings)


_CUT = "the weight of sink heads on key 0 set to 0"
_CHANGES = {
    "before": "the unchanged model; losses are of targets from position 2 on",
    "sink heads": "heads whose mean weight on key 0 exceeds 0.3",
    "first token removed": "the sequence begins with its second token",
    "first token replaced": "by the most frequent token that is not special",
    "its top channel to the mean": "the largest channel at position 0, after every layer",
    "sink heads cut": _CUT,
    "cut, renormalised": _CUT + ", the row's sum kept",
}
INTERVENTIONS = {
    "first_token_removed": "first token removed",
    "first_token_replaced": "first token replaced",
    "channel_to_mean": "its top channel to the mean",
    "sinks_cut": "sink heads cut",
    "sinks_cut_renormalized": "cut, renormalised",
}
"""Name -> title of its column."""


def interventions(results: Results, length: int) -> list[Table]:
    """Changes of the loss and sink rates by intervention; none if they were not measured."""
    if not results.where("intervention", length=length):
        return []
    changes, rates = [], []
    for label in results.labels:
        by_name = {
            name: results.where("intervention", label=label, length=length, name=name)
            for name in INTERVENTIONS
        }
        removed, cut = by_name["first_token_removed"], by_name["sinks_cut"]
        heads = cell(mean_of(r["heads"] for r in cut), "{:.1f}".format)
        changes.append([label, cell(mean_of(r["before"] for r in removed), loss), heads])
        rates.append(
            [label, cell(mean_of(r["sink_rate_before"] for r in removed), percent, 100), heads]
        )
        for records in by_name.values():
            # a seed without sink heads has none to cut
            seeds = [r for r in records if r.get("heads") != 0]
            part = f" ({len(seeds)} of {len(records)} seeds)" if len(seeds) < len(records) else ""
            differences = mean_of(
                math.nan if None in (r["value"], r["before"]) else r["value"] - r["before"]
                for r in seeds
            )
            after = mean_of(r["sink_rate"] for r in seeds)
            changes[-1].append(_change(differences) + part if seeds else "none")
            rates[-1].append(cell(after, percent, 100) + part if seeds else "none")
    replaced = {
        f"{r['token']} ({r['token_text']!r})"
        for r in results.where("intervention", length=length, name="first_token_replaced")
    }
    note = f"The first token is replaced by token {', '.join(sorted(replaced))}."
    header = ["arm", "before", "sink heads", *INTERVENTIONS.values()]
    of_loss = f"Interventions at {tokens(results, length)}: change of the loss, nats per token"
    of_sinks = f"Interventions at {tokens(results, length)}: sink rate > 0.3, %"
    return [
        Table(of_loss, header, changes, note, _CHANGES),
        Table(of_sinks, header, rates, note, _CHANGES),
    ]


def _change(value: Mean | None) -> str:
    """A difference with its sign."""
    text = cell(value, loss)
    return f"+{text}" if value is not None and value.mean >= 0 else text


def quantized(results: Results) -> Table | None:
    """Perplexity by bits per weight; None if it was not measured."""
    bits = sorted({r["bits"] for r in results.where("perplexity") if "bits" in r}, reverse=True)
    if not bits:
        return None
    length = max(r["length"] for r in results.where("perplexity") if "bits" in r)
    rows = []
    for label in results.labels:
        means = [results.of_model("perplexity", label, length, bits=n) for n in (None, *bits)]
        rows.append([label, *(cell(m, number) for m in means)])
    title = f"Perplexity with quantised weights, {tokens(results, length)}"
    return Table(title, ["arm", "32 bits", *(f"{n} bits" for n in bits)], rows)


def passkey(results: Results) -> Table | None:
    """Share of passkeys retrieved, %, by length and depth; None if it was not measured."""
    records = results.where("passkey")
    if not records:
        return None
    depths = sorted({r["depth"] for r in records})
    rows = []
    for label in results.labels:
        for length in sorted({r["length"] for r in records}):
            means = [results.of_model("passkey", label, length, depth=d) for d in depths]
            rows.append([f"{label}, {length:,}", *(cell(m, percent, 100) for m in means)])
    title = "Passkeys retrieved, %, by depth"
    return Table(title, ["arm, length", *(f"{d:g}" for d in depths)], rows)


def over_depths(results: Results, metric: str, label: str, **keys: Any) -> dict[float, Mean]:
    """Length -> a passkey metric: mean over the depths of a model, then over the seeds."""
    by_model: dict[int, dict[str, list[float | None]]] = {}
    for r in results.where(metric, label=label, **keys):
        by_model.setdefault(r["length"], {}).setdefault(r["model"], []).append(r["value"])
    return {  # pyright: ignore[reportReturnType]  # each length has at least one model, so no mean is None
        length: mean_of(mean_of(values).mean for values in models.values())  # pyright: ignore[reportOptionalMemberAccess]  # each model has at least one value, so no mean is None
        for length, models in sorted(by_model.items())
    }


PLANTED = ("with_key", "other_key", "without_key")
"""What the text holds when the key is asked for."""


def passkey_losses(results: Results) -> Table | None:
    """Loss of the key as the answer; None if it was not measured."""
    if not results.where("passkey_loss"):
        return None
    rows = []
    for label in results.labels:
        losses = [over_depths(results, "passkey_loss", label, planted=p) for p in PLANTED]
        for length in losses[0]:
            cells = [cell(by_length.get(length), number) for by_length in losses]
            rows.append([f"{label}, {length:,}", *cells])
    title = "Loss of the passkey's digits, nats, mean over depths"
    header = ["arm, length", "the key in the text", "another in its place", "none"]
    return Table(title, header, rows)


def all_tables(results: Results) -> list[Table]:
    """The training length first, since readers look for it first."""
    lengths = results.lengths_to_show
    found = [table(results, n) for table in (summary, sinks, attention) for n in lengths]
    found.append(extremes(results, lengths[0]))
    found += [table for n in lengths for table in interventions(results, n)]
    more = (quantized(results), passkey(results), passkey_losses(results))
    return found + [table for table in more if table is not None]


def facts(results: Results) -> list[str]:
    """Facts about the measurement, one sentence each."""
    setup = results.setup
    # records older than --training.bos lack the key "begins"
    first = {"text": "a token of the text", "bos": "bos", "eos": "eos"}
    begins = setup.get("begins") or first[setup["first_token"]]
    seeds = any(sum(r["label"] == x for r in results.models) > 1 for x in results.labels)
    return [
        f"data: {setup['data']}, {setup['samples']} sequences from {setup['documents']} documents, which lie in "
        f"the last {setup['share_from_end']:.2%} of it",
        f"token 0 of every sequence: {begins}",
        f"lengths: {', '.join(f'{n:,}' for n in results.lengths)} tokens, of the same beginnings; {_trained(results)}",
        *(["a ± b: mean and standard deviation over the seeds of an arm"] if seeds else []),
        "definitions: docs/softpick/ANALYSIS.md, after arXiv:2504.20966; percentages of heads are of (layer, head), sink "
        "rates of (sample, layer, head)",
        f"{setup['date']}, {setup['device']}, torch {setup['torch']}, float32",
    ]


def _trained(results: Results) -> str:
    """The training length of the arms."""
    arms: dict[int | None, list[str]] = {}
    for r in results.models:
        labels = arms.setdefault(r.get("training_length"), [])
        if r["label"] not in labels:
            labels.append(r["label"])
    if list(arms) == [None]:
        return "the training length is unknown, since no run.json names it"
    if len(arms) == 1:
        return f"training length: {next(iter(arms)):,} tokens"
    each = [f"{'unknown' if n is None else f'{n:,}'} ({', '.join(x)})" for n, x in arms.items()]
    return f"training length: {', '.join(each)}"
