"""Maps as inline SVG: shades of weights by layer and head, and by query and key."""

import math

from flame.analysis.report.svg import WIDTH, svg

LEVELS = 20
"""Shades of a heat map."""


def level(share: float) -> int:
    """Shade of a share in [0, 1]: 0 for exactly 0 and for NaN, else 1 to `LEVELS`."""
    return min(LEVELS, max(1, math.ceil(share * LEVELS))) if share > 0 else 0


def heat_map(values: list[list[float]], rows: str, columns: str, what: str, most: float) -> str:
    """One cell for each number in [0, most] or NaN; ``values[row][column]``, row 0 on top."""
    n, m = len(values), len(values[0])
    side = min(30.0, (WIDTH - 46) / m, 330 / n)
    left, top = 40, 4
    cells = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            shown = f"{value:.4g}" if math.isfinite(value) else "not finite"
            title = f"{rows} {i}, {columns} {j}: {shown}"
            box = f'x="{left + j * side:.1f}" y="{top + i * side:.1f}" width="{side:.2f}" height="{side:.2f}"'
            cells.append(
                f'<rect class="l{level(value / most)}" {box}><title>{title}</title></rect>'
            )
    height = n * side
    frame = f'<path class="frame" d="M{left} {top}h{m * side:.1f}v{height:.1f}h-{m * side:.1f}z"/>'
    texts = []
    for i in _some(n, math.ceil(n * 14 / height)):
        texts.append(
            f'<text class="tick end" x="{left - 5}" y="{top + (i + 0.5) * side + 4:.1f}">{i}</text>'
        )
    for j in _some(m, math.ceil(m * 18 / (m * side))):
        x = left + (j + 0.5) * side
        texts.append(
            f'<text class="tick middle" x="{x:.1f}" y="{top + height + 14:.1f}">{j}</text>'
        )
    texts.append(
        f'<text class="label" x="{left}" y="{top + height + 30:.1f}">{columns} →, {rows} ↓</text>'
    )
    return svg(left + m * side + 6, top + height + 36, what, [*cells, frame, *texts], grow=False)


def _some(n: int, stride: int) -> range:
    return range(0, n, max(1, stride))


def triangle_map(cells: list[list[float | None]], length: int, what: str) -> str:
    """An attention map: rows of the lower triangle, shares in [0, 1], shaded by their root; None is blank."""
    n = len(cells)
    left, top, side = 40, 4, 300
    unit = side / n
    paths: dict[int, list[str]] = {}
    for i, row in enumerate(cells):
        for j, value in enumerate(row):
            if shade := level(math.sqrt(max(value or 0.0, 0.0))):
                paths.setdefault(shade, []).append(f"M{j} {i}h1v1h-1z")
    shades = "".join(f'<path class="l{s}" d="{"".join(d)}"/>' for s, d in sorted(paths.items()))
    parts = [
        f'<g transform="translate({left} {top}) scale({unit:.5g})" shape-rendering="crispEdges">{shades}</g>',
        f'<path class="frame" d="M{left} {top}h{side}v{side}h-{side}z"/>',
        f'<path class="axis" d="M{left} {top}l{side} {side}"/>',
    ]
    for share in (0.0, 0.5, 1.0):
        at, text = share * side, f"{share * length:g}"
        parts.append(
            f'<text class="tick end" x="{left - 5}" y="{top + max(10, at):g}">{text}</text>'
        )
        anchor = "end" if share == 1 else "middle" if share else "start"
        parts.append(
            f'<text class="tick {anchor}" x="{left + at:g}" y="{top + side + 14}">{text}</text>'
        )
    label = "key position →, query position ↓"
    parts.append(f'<text class="label" x="{left}" y="{top + side + 30}">{label}</text>')
    return svg(left + side + 6, top + side + 36, what, parts)


def color_bar(marks: dict[float, str], title: str) -> str:
    """A bar of all shades from 0 to 1, with labels ``marks``: share -> text."""
    left, width, height = 4, 210, 12
    parts = [
        f'<rect class="l{n}" x="{left + (n - 1) * width / LEVELS:.1f}" y="2" width="{width / LEVELS + 0.3:.2f}" height="{height}"/>'
        for n in range(1, LEVELS + 1)
    ]
    parts.append(f'<path class="frame" d="M{left} 2h{width}v{height}h-{width}z"/>')
    for share, text in marks.items():
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        parts.append(
            f'<text class="tick {anchor}" x="{left + share * width:g}" y="{height + 15}">{text}</text>'
        )
    return svg(left + width + 4, height + 20, title, parts, grow=False)
