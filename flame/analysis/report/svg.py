"""Charts as inline SVG: lines with their spread. Colours are classes, so that the page's style decides them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from flame.analysis.records import Mean
from flame.analysis.report.palette import COLORS

WIDTH, HEIGHT = 380, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 26, 38
_DASHES = ("", "6 3", "2 2")
_MARKS_AT_MOST = 12


@dataclass(frozen=True)
class Line:
    """One arm in a chart."""

    slot: int
    """Selects colour, marker and dash, see `palette.slots`."""
    label: str
    points: dict[float, Mean]


@dataclass(frozen=True)
class Axis:
    """A scale and its label, with the unit."""

    label: str
    log: bool = False
    ticks: tuple[float, ...] = ()
    """Positions of the ticks; empty: round numbers."""
    low: float | None = None
    """Lower end of the axis; None: fitted to the data."""
    high: float | None = None
    """Upper end of the axis; None: fitted to the data. Values slightly above are clipped."""
    mark: float | None = None
    """Position of a dashed line across the chart."""

    @property
    def text(self) -> str:
        """The label, which says so if the scale is logarithmic."""
        return f"{self.label}, log scale" if self.log else self.label


def tick_text(x: float) -> str:
    """A number short enough for an axis."""
    if x == 0:
        return "0"
    magnitude = abs(x)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if limit <= magnitude < 1e12:
            divisor = {"G": 1e9, "M": 1e6, "k": 1e3}[unit]
            return f"{x / divisor:g}{unit}"
    return f"{x:.0e}".replace("e-0", "e-") if magnitude < 1e-3 or magnitude >= 1e12 else f"{x:g}"


class _Scale:
    """Maps values to positions between two ends."""

    def __init__(
        self, axis: Axis, values: Sequence[float], start: float, end: float, count: int
    ) -> None:
        self.axis, self.start, self.end = axis, start, end
        low, high = min(values, default=0.0), max(values, default=1.0)
        low = low if axis.low is None else axis.low
        high = high if axis.high is None else axis.high
        if axis.log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-12:
            # an axis of zeros starts at 0
            below, above = (0.5, 0.5) if low or axis.log else (0.0, 1.0)
            low, high = low - (below if axis.low is None else 0.0), high + above
        if axis.ticks:
            self.ticks = list(axis.ticks)
        elif axis.log:
            self.ticks, low, high = _log_ticks(low, high, count)
        else:
            step = round_up((high - low) / count)
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
            self.ticks = [low + i * step for i in range(round((high - low) / step) + 1)]
            # rounding errors around 0 become 0
            self.ticks = [0.0 if abs(x) < step / 1e6 else float(f"{x:.10g}") for x in self.ticks]
        self.low, self.high = low, high

    def __call__(self, x: float) -> float:
        x = math.log10(x) if self.axis.log else x
        fraction = (x - self.low) / (self.high - self.low)
        return round(self.start + min(max(fraction, 0.0), 1.0) * (self.end - self.start), 1)


def round_up(least: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= least * (1 - 1e-9))


def _log_ticks(low: float, high: float, count: int) -> tuple[list[float], float, float]:
    """Powers of ten where they are enough, else multiples of each, more of them within a decade; log10 of the ends."""
    if high - low >= 2:
        low, high = math.floor(low + 1e-9), math.ceil(high - 1e-9)
        stride = max(1, math.ceil((high - low) / count))
        return [10.0**n for n in range(low, high + 1, stride)], low, high
    multiples = (1, 2, 5) if high - low >= 1 else (1, 1.5, 2, 3, 4, 6, 8)
    candidates = [
        n * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for n in multiples
    ]
    below = [math.log10(x) for x in candidates if math.log10(x) <= low + 1e-9]
    above = [math.log10(x) for x in candidates if math.log10(x) >= high - 1e-9]
    low, high = max(below, default=low), min(above, default=high)
    return [x for x in candidates if low - 1e-9 <= math.log10(x) <= high + 1e-9], low, high


def _usable(lines: Iterable[Line], x: Axis, y: Axis) -> list[Line]:
    """The lines without points that are not finite, or that have no logarithm on a log axis."""

    def fits(x_value: float, value: Mean) -> bool:
        is_finite = math.isfinite(x_value) and math.isfinite(value.mean)
        return is_finite and (not x.log or x_value > 0) and (not y.log or value.mean > 0)

    return [
        Line(line.slot, line.label, {a: m for a, m in line.points.items() if fits(a, m)})
        for line in lines
    ]


def line_chart(lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """Lines with markers, and bars or bands of one standard deviation; "" where there is nothing to draw."""
    lines = [line for line in _usable(lines, x, y) if line.points]
    if not lines:
        return ""
    ends = []
    for line in lines:
        for mean, std, _ in line.points.values():
            spread = [mean - (std or 0.0), mean + (std or 0.0)]
            ends += [v for v in [mean, *spread] if not y.log or v > 0]
    to_x = _Scale(x, [a for line in lines for a in line.points], _LEFT, WIDTH - _RIGHT, 5)
    to_y = _Scale(y, ends, HEIGHT - _BOTTOM, _TOP, 5)
    parts = []
    for tick in to_y.ticks:
        at = to_y(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {at}H{WIDTH - _RIGHT}"/>')
        parts.append(
            f'<text class="tick end" x="{_LEFT - 6}" y="{at + 4:g}">{tick_text(tick)}</text>'
        )
    last = -math.inf
    for tick in to_x.ticks:
        at = to_x(tick)
        parts.append(f'<path class="axis" d="M{at} {HEIGHT - _BOTTOM}v4"/>')
        text = tick_text(tick)
        # skip labels that would overlap
        if at - last >= 7 * len(text) + 8:
            anchor = "end" if at > WIDTH - _RIGHT - 8 else "middle"
            parts.append(
                f'<text class="tick {anchor}" x="{at}" y="{HEIGHT - _BOTTOM + 17}">{text}</text>'
            )
            last = at
    parts.append(f'<path class="axis" d="M{_LEFT} {HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="label middle" x="{middle:g}" y="{HEIGHT - 4}">{escape(x.text)}</text>'
    )
    parts.append(f'<text class="label start" x="4" y="12">{escape(y.text)}</text>')
    if x.mark is not None:
        parts.append(f'<path class="bound" d="M{to_x(x.mark)} {_TOP}V{HEIGHT - _BOTTOM}"/>')
    parts += [_line(line, to_x, to_y) for line in lines]
    return svg(WIDTH, HEIGHT, f"{y.text} by {x.text}", parts)


def _line(line: Line, to_x: _Scale, to_y: _Scale) -> str:
    points = line.points
    points_xy = [(to_x(a), to_y(m.mean)) for a, m in points.items()]
    few = len(points) <= _MARKS_AT_MOST
    parts = []
    spreads = [
        (a, m.mean, m.std) for a, m in points.items() if m.std is not None and math.isfinite(m.std)
    ]
    floor = 10.0**to_y.low if to_y.axis.log else to_y.low
    bars = [(to_x(a), to_y(max(x - std, floor)), to_y(x + std)) for a, x, std in spreads]
    if few:
        parts += [f'<path class="bar" d="M{a} {low}V{high}"/>' for a, low, high in bars]
    elif bars:
        there = " ".join(f"{a},{high}" for a, _, high in bars)
        back = " ".join(f"{a},{low}" for a, low, _ in reversed(bars))
        parts.append(f'<polygon class="band" points="{there} {back}"/>')
    if len(points_xy) > 1:
        d = " ".join(f"{a},{b}" for a, b in points_xy)
        parts.append(f'<polyline stroke-dasharray="{_dash(line.slot)}" points="{d}"/>')
    stride = 1 if few else math.ceil(len(points) / 6)
    for n, ((a, mean), (px, py)) in enumerate(zip(points.items(), points_xy, strict=True)):
        # offset by line, so that the markers of several lines do not overlap
        if few or n % stride == (line.slot * 2) % stride:
            spread = "" if mean.std is None else f" ± {mean.std:.4g}"
            title = f"{line.label}, {a:g}: {mean.mean:.6g}{spread}"
            parts.append(
                f'<path class="mark" d="{mark_of(line.slot, px, py)}"><title>{escape(title)}</title></path>'
            )
    return f'<g class="{kind_of(line.slot)}">{"".join(parts)}</g>'


def kind_of(slot: int) -> str:
    """CSS classes of an arm: its colour, and hollow markers where the shapes repeat."""
    hue = slot % len(COLORS)
    return f"s s{hue}" + (" hollow" if hue // len(_SHAPES) % 2 else "")


def _dash(slot: int) -> str:
    """Dashes once the colours repeat."""
    return _DASHES[slot // len(COLORS) % len(_DASHES)]


_SHAPES = (
    "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "m-3 -3h6v6h-6z",
    "m0 -4l4 7h-8z",
    "m0 -4.5l4.5 4.5l-4.5 4.5l-4.5 -4.5z",
    "m0 4l4 -7h-8z",
    "m-1.3 -4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
    "m-4.5 -1.5h9v3h-9z",
)


def mark_of(slot: int, x: float, y: float) -> str:
    """Path of an arm's marker."""
    return f"M{x} {y}{_SHAPES[slot % len(COLORS) % len(_SHAPES)]}"


def legend(slots: dict[str, int]) -> str:
    """The arms with colour, marker and dash, as a list of HTML."""
    items = []
    for label, slot in slots.items():
        swatch = (
            f'<svg viewBox="0 0 34 12" width="34" height="12" aria-hidden="true"><g class="{kind_of(slot)}">'
            f'<polyline stroke-dasharray="{_dash(slot)}" points="1,6 33,6"/><path class="mark" d="{mark_of(slot, 17, 6)}"/></g></svg>'
        )
        items.append(f"<li>{swatch}{escape(label)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def svg(width: float, height: float, what: str, parts: Iterable[str], grow: bool = True) -> str:
    """The element around the parts of a drawing; without ``grow`` it keeps its width."""
    fixed = "" if grow else f' style="width:{width:.0f}px"'
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(what)}"{fixed}>'
        f"{''.join(parts)}</svg>"
    )
