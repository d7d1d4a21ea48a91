"""An audit as a terminal table and as a small page in the report's style; nothing is computed here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from dse.audit.types import Audit, Nearest, as_dict
from dse.report.html import POLICY
from dse.report.names import plain
from dse.report.style import CSS, SCRIPT

COLOURS = {"holds": "green", "wrong": "red", "impossible": "bold red", "unknown": "yellow"}
HEADS = ("verdict", "of", "claimed", "computed", "why")


class _Printed:
    """An audit that takes the width of the console it is printed on."""

    def __init__(self, audit: Audit) -> None:
        self.audit = audit

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        a = self.audit
        yield Text(plain(a.name), style="bold")
        if a.description:
            yield Text(plain(a.description), style="dim")
        yield Text(_counts(a))
        for line in a.assumptions:
            yield Text(f"Note: {plain(line)}", style="dim")
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 1, 0))
        for f in a.findings:
            claimed, computed = Text(plain(f.claimed)), Text(plain(f.computed), style="bold")
            said = Text.assemble((f"{plain(f.name)}: ", "cyan"), claimed, *((" → ", computed) if f.computed else ()))
            table.add_row(Text(f.verdict, style=COLOURS[f.verdict]), said.append(f"\n{plain(f.why)}", style="dim"))
        yield ""
        yield table
        if a.nearest is not None:
            yield Text(_capital(plain(a.nearest.text)), style="green" if a.nearest.meets else "yellow")


def render(audit: Audit) -> RenderableType:
    """What the command line prints."""
    return _Printed(audit)


def to_json(audit: Audit) -> str:
    """The contract's JSON."""
    return json.dumps(as_dict(audit), indent=1, ensure_ascii=False, allow_nan=False)


def html(audit: Audit) -> str:
    """The whole page."""
    return page(f"{audit.name} – audit of a plan", section(audit))


def section(audit: Audit) -> str:
    """The audit as HTML, to stand in a page of its own or in another."""
    rows = "".join(
        f"<tr><td><b>{escape(f.verdict)}</b></td><td>{escape(f.name)}</td><td class='why'>{escape(f.claimed)}</td>"
        f"<td class='why'>{escape(f.computed)}</td><td class='why'>{escape(f.why)}</td></tr>"
        for f in audit.findings
    )
    heads = "".join(f"<th>{head}</th>" for head in HEADS)
    taken = "".join(f'<p class="note info">{escape(line)}</p>' for line in audit.assumptions)
    lead = f'<p class="lead">{escape(audit.description)}</p>' if audit.description else ""
    return f"""
<header><h1>{escape(audit.name)}</h1>{lead}</header>
<p class="note {"info" if audit.count("holds") == len(audit.findings) else "bad"}">{escape(_counts(audit))}</p>{taken}
<section><h2>Every claim, recomputed</h2>
<div class="scroll"><table class="wide"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>
{_nearest(audit.nearest)}"""


def _nearest(nearest: Nearest | None) -> str:
    if nearest is None:
        return ""
    rows = "".join(
        f"<tr{' class=strong' if b.broken else ''}><td>{escape(b.kind)}</td><td class='why'>{escape(b.text)}</td>"
        f"<td>{'rules the targets out' if b.broken else 'leaves room'}</td></tr>"
        for b in nearest.bounds
    )
    kind = "info" if nearest.meets else "bad"
    return f"""
<section><h2>{"A plan that meets the targets" if nearest.meets else "The targets cannot be met"}</h2>
<p class="note {kind}">{escape(_capital(nearest.text))}</p>
<div class="scroll"><table><thead><tr><th>bound</th><th>limit</th><th></th></tr></thead><tbody>{rows}</tbody></table>
</div><p class="muted">{nearest.tried:,} plans around it were priced.</p></section>"""


def page(title: str, body: str, figures: Mapping[str, Any] | None = None) -> str:
    """A self-contained page in the report's style; plotly.js is inlined only where there are figures."""
    library = ""
    if figures:
        from plotly.offline import get_plotlyjs

        library = f"<script>{get_plotlyjs()}</script>"
    data = json.dumps(dict(figures or {}), separators=(",", ":"), allow_nan=False)
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="figures">{data}</script>
{library}<script>{SCRIPT}</script>
</body>
</html>
"""


def _counts(audit: Audit) -> str:
    names = {"holds": "hold", "wrong": "are wrong", "impossible": "are impossible", "unknown": "cannot be decided"}
    parts = [f"{n} {names[v]}" for v in names if (n := audit.count(v))]  # type: ignore[arg-type]
    return f"Of {len(audit.findings)} claims {', '.join(parts)}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


__all__ = ["html", "page", "render", "section", "to_json"]
