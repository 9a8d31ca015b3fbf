"""A profile as a single HTML page without scripts and without anything to be fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup, escape

from vlm_fast.advisor import plots


def html_page(profile: dict[str, Any]) -> str:
    """The HTML page of a profile (`report_data.document`); every string in it is escaped.

    If matplotlib is not installed, a sentence that says so takes the place of each chart.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": plots.duration, "size": plots.size}
    template = resources.files("vlm_fast.advisor").joinpath("report.html.jinja").read_text()
    batches = [
        {
            "batch": batch,
            "pareto_points": plots.pareto_points(rows),
            "measured": len(rows),
            "trade_off": _chart(plots.trade_off, rows),
            "shares": _chart(plots.shares, rows),
            "bases": sorted({row["language"]["basis"] for row in rows}),
        }
        for batch, rows in plots.batches_of(profile).items()
    ]
    missed = [row for row in profile["rows"] if row["times"] is None]
    return environment.from_string(template).render(
        profile=profile, batches=batches, missed=missed, machine=plots.machine(profile)
    )


def _chart(draw: Callable[[Sequence[plots.Row]], str], rows: Sequence[plots.Row]) -> Markup:
    try:
        return Markup(draw(rows))  # matplotlib escapes texts in its SVG
    except ImportError:
        return Markup('<p class="note">No chart: ') + escape(plots.NO_MATPLOTLIB) + Markup("</p>")
