"""The report as Markdown."""

from flame.analysis.records import Results
from flame.analysis.report import answers, tables


def report(results: Results) -> str:
    """The whole of ``report.md``."""
    said = [f"- **{title}**: {text}" for title, text in answers.sentences(results)]
    head = ["# Attention normalisers compared", "", f"{answers.lead(results)}.", "", *said, ""]
    facts = [*(f"- {x}" for x in tables.facts(results)), ""]
    every = tables.all_tables(results)
    meanings: dict[str, str] = {}
    for table in every:
        meanings |= table.meanings
    columns = ["### Columns", "", *(f"- **{k}**: {v}" for k, v in meanings.items()), ""]
    return "\n".join(
        [
            *head,
            answers.table(results).markdown(),
            "### The measurement",
            "",
            *facts,
            *(t.markdown() for t in every),
            *columns,
        ]
    )
