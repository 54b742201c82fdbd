"""Tables and figures as HTML."""

from html import escape

from flame.analysis.records import Results
from flame.analysis.report.cells import Table
from flame.analysis.report.palette import slots
from flame.analysis.report.svg import legend


def html_table(table: Table) -> str:
    """The table as HTML, in a box that scrolls sideways."""
    head = "".join(f'<th scope="col">{escape(x)}</th>' for x in table.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{_cell(x)}</td>" for x in row[1:])
        + "</tr>"
        for row in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def folded(*hidden: Table) -> str:
    """Tables behind their titles, each to be opened."""
    return "".join(
        f"<details><summary>{escape(t.title)}</summary>{html_table(t)}</details>" for t in hidden
    )


def _cell(text: str) -> str:
    """A mean with its spread below it, so that wide tables stay on the screen."""
    mean, sign, spread = escape(text).partition(" ± ")
    return f"{mean}<small> ± {spread}</small>" if sign else mean


def figure(title: str, unit: str, drawing: str) -> str:
    """A drawing under its title and unit; "" where there is no drawing."""
    if not drawing:
        return ""
    note = f" <span>{escape(unit)}</span>" if unit else ""
    return f"<figure><figcaption>{escape(title)}{note}</figcaption>{drawing}</figure>"


def grid(figures: list[str], results: Results | None, kind: str = "") -> str:
    """Figures in a row that wraps, with the legend of the arms above."""
    figures = [x for x in figures if x]
    if not figures:
        return ""
    above = legend(slots(results.models)) if results else ""
    return f'{above}<div class="grid-of {kind}">{"".join(figures)}</div>'
