"""Charts over lengths in the report of `flame.analyze`: lines, bars for one length, and where training ended."""

import re

from flame.analysis.records import Mean
from flame.analysis.report.bars import chart
from flame.analysis.report.cells import number, percent
from flame.analysis.report.svg import Axis, Line, line_chart

LENGTH = Axis("length, tokens", log=True, ticks=(64.0,))


def blocks(drawing):
    """Start and end of each bar."""
    return [
        (float(a), float(b))
        for a, b in re.findall(r'class="block" d="M([\d.]+) [\d.]+H([\d.]+)', drawing)
    ]


def test_one_length_gives_bars():
    lines = [
        Line(0, "softmax", {64: Mean(20.0, 2.0, 3)}),
        Line(1, "softpick", {64: Mean(5.0, None, 1)}),
        Line(2, "a <b>", {64: Mean(0.0, 0.0, 2)}),
        Line(3, "broken", {64: Mean(float("nan"), None, 1)}),
    ]
    drawing = chart(lines, LENGTH, Axis("kurtosis", log=True), number)
    assert "polyline" not in drawing
    # lengths from 0: a logarithm would hide that one is four times the other
    assert "log scale" not in drawing
    (zero, high), (start, low), (same, none) = blocks(drawing)
    assert zero == start == same == none
    assert abs((high - zero) - 4 * (low - zero)) < 0.5
    # never by colour alone: name and value are text
    for text in (">softmax</text>", ">20.00 ± 2.0</text>", ">5.000</text>", ">a &lt;b&gt;</text>"):
        assert text in drawing
    assert "broken" not in drawing
    assert "nan" not in drawing
    shapes = re.findall(r'class="mark" d="M[\d.]+ [\d.]+([^"]+)"', drawing)
    assert len(set(shapes)) == 3


def test_several_lengths_give_lines_and_nothing_gives_nothing():
    lines = [Line(0, "a", {64: Mean(1.0, None, 1)}), Line(1, "b", {128: Mean(2.0, None, 1)})]
    y = Axis("%")
    assert chart(lines, LENGTH, y, percent) == line_chart(lines, LENGTH, y) != ""
    assert chart([], LENGTH, y, percent) == ""
    assert chart([Line(0, "a", {64: Mean(float("inf"), None, 1)})], LENGTH, y, percent) == ""


def test_a_long_name_stays_in_its_column():
    lines = [Line(0, "x" * 60, {64: Mean(1.0, None, 1)})]
    drawing = chart(lines, LENGTH, Axis("%"), percent)
    width = float(re.search(r'textLength="(\d+)"', drawing)[1])
    assert 18 + width < blocks(drawing)[0][0]


def test_the_end_of_training_is_drawn_across_lengths():
    lines = [Line(0, "a", {64: Mean(1.0, None, 1), 256: Mean(1.0, None, 1)})]
    marked = line_chart(lines, Axis("x", log=True, ticks=(64, 256), mark=128), Axis("y"))
    # halfway between 50 and 368
    assert 'class="bound" d="M209.0 ' in marked
    assert "bound" not in line_chart(lines, Axis("x", log=True, ticks=(64, 256)), Axis("y"))
