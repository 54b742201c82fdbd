"""Tables and figures as HTML."""

import re
from html import escape

from flame.analysis.records import Results
from flame.analysis.report.cells import Table
from flame.analysis.report.palette import slots
from flame.analysis.report.svg import legend


def html_table(table: Table) -> str:
    """The table as HTML, in a box that scrolls sideways; a column's meaning shows under the mouse."""
    head = "".join(_head(title, table.meanings.get(title, "")) for title in table.header)
    rows = "".join(
        f'<tr><th scope="row">{_breakable(row[0])}</th>'
        + "".join(f"<td>{_cell(x)}</td>" for x in row[1:])
        + "</tr>"
        for row in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _head(title: str, meaning: str) -> str:
    text = f'<abbr title="{escape(meaning)}">{escape(title)}</abbr>' if meaning else escape(title)
    return f'<th scope="col">{text}</th>'


def _breakable(name: str) -> str:
    """A name that a narrow screen may break."""
    return escape(name).replace("_", "_<wbr>").replace("/", "/<wbr>")


def columns(*shown: Table) -> str:
    """The meanings of all columns of the tables, to be opened where there is no mouse."""
    meanings: dict[str, str] = {}
    for table in shown:
        meanings |= table.meanings
    if not meanings:
        return ""
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in meanings.items())
    return f"<details><summary>What the columns mean</summary><dl>{items}</dl></details>"


def folded(*hidden: Table) -> str:
    """Tables behind their titles, each to be opened."""
    return "".join(
        f"<details><summary>{escape(t.title)}</summary>{html_table(t)}</details>" for t in hidden
    )


_SPREAD = re.compile(r"(.*?)( [±(].*)", re.DOTALL)


def _cell(text: str) -> str:
    """A mean, and below it its spread or difference, so that wide tables stay on the screen."""
    found = _SPREAD.fullmatch(escape(text))
    if not found:
        return escape(text)
    difference, sign, spread = found[2].partition("± ")
    parts = [x.strip() for x in (difference, sign + spread) if x.strip()]
    # a narrow screen breaks between the two alone
    return f"{found[1]}<small> {' '.join(f'<span>{x}</span>' for x in parts)}</small>"


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
