"""The colour of an arm, the same in every chart of every report."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

from flame.analysis.records import Record


class Color(NamedTuple):
    """Two shades of one hue."""

    light: str
    """On white."""
    dark: str
    """On black."""


# softmax and softpick as in docs/softpick/plot_softpick.py, a little stronger for thin lines
FIXED = {
    "softmax": Color("#858585", "#a8a8a8"),
    "softpick": Color("#c0392b", "#ff6b5e"),
    "relu_softpick": Color("#d07a00", "#ffab40"),
    "abs_softpick": Color("#8e44ad", "#c893f0"),
    "softmax_plus_one": Color("#1f6fb4", "#64b0f4"),
    "rectified": Color("#15824a", "#46c685"),
    "scaled_softpick": Color("#d1478c", "#ff93c9"),
    "scaled_softmax": Color("#34495e", "#dbe4ec"),
    "gated": Color("#00858e", "#40cdd6"),
    "gpt_oss": Color("#857400", "#d8c33c"),
}
"""Arms of configs/sweeps by name: the normalisers, and softmax and softpick with one addition."""
SPARE = (
    Color("#4a4cd6", "#9c9eff"),
    Color("#7a4a2c", "#cf9f7b"),
    Color("#649200", "#a6d63e"),
    Color("#a3004f", "#e57aa0"),
)
"""For all other arms."""
COLORS = (*FIXED.values(), *SPARE)
_ADDITIONS = ("attn_sink", "attn_gate", "attn_log_scale")


def slots(models: Sequence[Record]) -> dict[str, int]:
    """Label of each arm -> its index in `COLORS`, plus a multiple of their number where arms outnumber them.

    An arm of another name than those of `FIXED` gets the colour of its normaliser, if it adds nothing to it and no
    other arm has this normaliser or this colour. Else it gets one of `SPARE`, by its name, so that it is the same in
    most reports.

    Args:
        models: Records of metric ``model``.
    """
    arms = {r["label"]: r for r in models}
    names = list(FIXED)
    found = {label: names.index(label) for label in arms if label in FIXED}
    plain = [
        (label, r.get("normalizer"))
        for label, r in arms.items()
        if label not in FIXED and not any(r.get(key) for key in _ADDITIONS)
    ]
    for label, normalizer in plain:
        is_alone = sum(r.get("normalizer") == normalizer for r in arms.values()) == 1
        if is_alone and normalizer in FIXED and normalizer not in arms:
            found[label] = names.index(normalizer)
    for label in arms:
        if label not in found:
            found[label] = _spare(label, set(found.values()))
    return {label: found[label] for label in arms}


def _spare(label: str, taken: set[int]) -> int:
    first = zlib.crc32(label.encode()) % len(SPARE)
    spares = [len(FIXED) + (first + n) % len(SPARE) for n in range(len(SPARE))]
    every = [*spares, *range(len(FIXED))]
    repeat = 0
    while True:
        for slot in every:
            if slot + repeat not in taken:
                return slot + repeat
        repeat += len(COLORS)
