"""A table of text, and the text of a number."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from flame.analysis.records import Mean


@dataclass(frozen=True)
class Table:
    """Text in rows; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    meanings: dict[str, str] = field(default_factory=dict)
    """Title of a column -> what it holds."""

    def markdown(self) -> str:
        """The table under a heading of level 3, its note below it; numbers are aligned to the right."""
        lines = [f"### {self.title}", ""]
        lines += ["| " + " | ".join(self.header) + " |"]
        lines += ["|---" + "|---:" * (len(self.header) - 1) + "|"]
        # a bar would end a cell, and <bos> would be a tag
        cells = [[x.replace("|", "\\|").replace("<", "&lt;") for x in row] for row in self.rows]
        lines += ["| " + " | ".join(row) + " |" for row in cells]
        return "\n".join(lines + ([f"\n{self.note}"] if self.note else [])) + "\n"


def number(x: float, digits: int = 4) -> str:
    """The number with ``digits`` significant digits."""
    if not math.isfinite(x):
        return "not finite"
    if x == 0:
        return "0"
    if abs(x) >= 1e6 or abs(x) < 1e-3:
        return f"{x:.{min(digits, 3) - 1}e}"
    return f"{x:,.{max(0, digits - 1 - math.floor(math.log10(abs(x))))}f}"


def percent(x: float) -> str:
    """A number with two decimals."""
    return f"{x:.2f}" if math.isfinite(x) else "not finite"


def loss(x: float) -> str:
    """A number with four decimals."""
    return f"{x:.4f}" if math.isfinite(x) else "not finite"


def cell(value: Mean | None, show: Callable[[float], str], factor: float = 1.0) -> str:
    """Mean and standard deviation over seeds."""
    if value is None:
        return "–"
    text = show(value.mean * factor)
    if value.std is None:
        return text
    # two digits suffice for a spread
    spread = show(value.std * factor) if show in (percent, loss) else number(value.std, digits=2)
    return f"{text} ± {spread}"
