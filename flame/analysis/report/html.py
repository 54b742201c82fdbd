"""The report as one self-contained HTML page: tables and charts drawn from the records."""

from html import escape

from flame.analysis.records import Results
from flame.analysis.report import answers, sections, tables
from flame.analysis.report.elements import columns, html_table
from flame.analysis.report.style import style_sheet


def page(results: Results) -> str:
    """The whole of ``report.html``."""
    parts = [
        ("summary", "Summary", sections.summary),
        ("sinks", "Attention sinks", sections.sinks),
        ("activations", "Activations", sections.activations),
        ("interventions", "Interventions", sections.interventions),
        ("weights", "Sparsity and sums of weights", sections.weights),
        ("maps", "Attention maps", sections.maps),
        ("training", "Training", sections.training),
        ("robustness", "Quantised weights and retrieval", sections.robustness),
    ]
    drawn = [(name, title, draw(results)) for name, title, draw in parts]
    drawn = [(name, title, body) for name, title, body in drawn if body]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in drawn)
    bodies = "".join(
        f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, title, body in drawn
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Attention normalisers compared</title><style>{style_sheet()}</style></head><body>"
        f"<h1>Attention normalisers compared</h1>{_answers(results)}{_measurement(results)}"
        f"<nav>{links}</nav>{bodies}</body></html>\n"
    )


def _answers(results: Results) -> str:
    """What the page says at a glance."""
    said = "".join(
        f"<li><b>{escape(title)}:</b> {escape(text)}</li>"
        for title, text in answers.sentences(results)
    )
    table = answers.table(results)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<section id="answers"><p class="lead">{escape(answers.lead(results))}</p>'
        f'<ul class="answers">{said}</ul>{html_table(table)}{note}{columns(table)}</section>'
    )


def _measurement(results: Results) -> str:
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in tables.facts(results))
    return (
        f'<details><summary>The measurement</summary><ul class="facts">{facts}</ul>'
        f"<pre>{escape(results.setup['command'])}</pre></details>"
    )
