"""Bars as inline SVG, for what a line chart would show as one column of points."""

import math
from collections.abc import Callable, Sequence
from html import escape

from flame.analysis.report.cells import cell
from flame.analysis.report.svg import WIDTH, Axis, Line, kind_of, line_chart, mark_of, svg

_HEIGHT, _TOP = 22, 20
_CHARACTER = 6.6
"""Width of a character of a label, in pixels, on average."""


def chart(lines: Sequence[Line], x: Axis, y: Axis, show: Callable[[float], str]) -> str:
    """Lines, or bars if all points have the same ``x``; "" where there is nothing to draw.

    Args:
        lines: The arms.
        x: The axis of the lines; of bars, what their caption names.
        y: The axis of the values.
        show: The text of a value.
    """
    if len({at for line in lines for at in line.points}) == 1:
        return _bar_chart(lines, y, show)
    return line_chart(lines, x, y)


def _bar_chart(lines: Sequence[Line], y: Axis, show: Callable[[float], str]) -> str:
    """A bar from 0 for each arm, with its name before and its value behind it; the scale is linear."""
    bars = [(line, mean) for line in lines for mean in line.points.values()]
    finite = [(line, mean) for line, mean in bars if math.isfinite(mean.mean)]
    if not finite:
        return ""
    texts = {line.label: cell(mean, show) for line, mean in finite}
    left = min(150.0, 22 + _CHARACTER * max(len(line.label) for line, _ in finite))
    right = WIDTH - 10 - _CHARACTER * max(len(text) for text in texts.values())
    ends = [mean.mean + (mean.std or 0.0) for _, mean in finite]
    most = max([x for x in ends if math.isfinite(x)], default=0.0)
    unit = (right - left) / most if most > 0 else 0.0
    bottom = _TOP + _HEIGHT * len(finite)
    parts = [f'<text class="label start" x="4" y="12">{escape(y.label)}</text>']
    for n, (line, mean) in enumerate(finite):
        top = _TOP + n * _HEIGHT
        middle = top + _HEIGHT / 2
        end = left + max(0.0, mean.mean * unit)
        text = texts[line.label]
        title = f"<title>{escape(f'{line.label}: {text}')}</title>"
        shapes = [
            f'<path class="mark" d="{mark_of(line.slot, 9, middle)}"/>',
            f'<path class="block" d="M{left:.1f} {top + 4}H{end:.1f}v{_HEIGHT - 8}H{left:.1f}z">{title}</path>',
        ]
        reach = end
        if mean.std is not None and math.isfinite(mean.std):
            low, reach = max(left, end - mean.std * unit), end + mean.std * unit
            shapes.append(f'<path class="bar" d="M{low:.1f} {middle:g}H{reach:.1f}"/>')
        parts.append(f'<g class="{kind_of(line.slot)}">{"".join(shapes)}</g>')
        # a name that is too long is squeezed
        fit = f' textLength="{left - 24:.0f}" lengthAdjust="spacingAndGlyphs"'
        squeezed = fit if _CHARACTER * len(line.label) > left - 20 else ""
        name = f'<text class="label start" x="18" y="{middle + 4:g}"{squeezed}>'
        parts.append(f"{name}{escape(line.label)}</text>")
        parts.append(
            f'<text class="value start" x="{reach + 6:.1f}" y="{middle + 4:g}">{text}</text>'
        )
    parts.append(f'<path class="axis" d="M{left:.1f} {_TOP}V{bottom}"/>')
    return svg(WIDTH, bottom + 4, y.label, parts)
