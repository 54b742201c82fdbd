"""The colours of arms in the report of `flame.analyze`."""

import itertools
import re

import pytest

from fla.ops.attn.softpick import NORMALIZERS
from flame.analysis.report.palette import COLORS, FIXED, SPARE, slots
from flame.analysis.report.style import style_sheet
from flame.analysis.report.svg import legend


def arm(label, normalizer="softmax", **additions):
    return {"label": label, "normalizer": normalizer} | additions


def names(*models):
    every = [*FIXED, *(f"spare {n}" for n in range(len(SPARE)))]
    return {label: every[slot % len(COLORS)] for label, slot in slots(models).items()}


def test_an_arm_has_its_colour_in_every_report():
    both = [arm("softpick", "softpick"), arm("softmax")]
    assert names(*both) == {"softpick": "softpick", "softmax": "softmax"}
    for others in itertools.permutations(
        [arm("x"), arm("gated", attn_gate=True), arm("rectified")]
    ):
        found = names(*others, *both)
        assert list(found) == [r["label"] for r in (*others, *both)]
        assert found.pop("x").startswith("spare")
        assert all(label == color for label, color in found.items())
    assert set(NORMALIZERS) <= set(FIXED)


def test_an_unknown_name_has_the_colour_of_its_normaliser_if_it_alone_has_it():
    assert names(arm("base"), arm("new", "softpick")) == {"base": "softmax", "new": "softpick"}
    found = names(arm("base"), arm("other"), arm("sink", "softpick", attn_sink=True))
    assert all(color.startswith("spare") for color in found.values())
    assert len(set(found.values())) == 3
    assert names(arm("softmax"), arm("base"))["base"].startswith("spare")


def test_arms_differ_in_more_than_colour():
    many = slots([arm(f"arm {n}") for n in range(3 * len(COLORS))])
    assert len(set(many.values())) == len(many)
    swatches = re.findall(
        r'<g class="([^"]*)"><polyline stroke-dasharray="([^"]*)".*? d="(.*?)"', legend(many)
    )
    assert len(set(swatches)) == len(many)
    # without the colour
    bare = {(" hollow" in kind, dash, mark) for kind, dash, mark in swatches}
    assert len(bare) == len(many)


def luminance(color):
    channels = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_colours_show_on_the_page(mode):
    light, dark = style_sheet().split("@media (prefers-color-scheme: dark)")
    text = light if mode == "light" else dark
    paper = luminance(re.search(r"--paper: (#\w+)", text)[1])
    colors = re.findall(r"--c\d+: (#\w+);", text)
    assert colors == [getattr(color, mode) for color in COLORS]
    assert len(set(colors)) == len(colors)
    for color in colors:
        high, low = sorted([luminance(color), paper], reverse=True)
        # WCAG 2.1 asks 3 : 1 of graphics
        assert (high + 0.05) / (low + 0.05) >= 3, color
