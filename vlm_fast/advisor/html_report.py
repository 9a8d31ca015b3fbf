"""A profile as one page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from vlm_fast.advisor.plots import (
    batches_of,
    duration,
    machine,
    pareto_points,
    shares,
    size,
    trade_off,
)


def html_page(profile: dict[str, Any]) -> str:
    """The HTML of a profile (`report_data.document`); every string in it is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": duration, "size": size}
    template = resources.files("vlm_fast.advisor").joinpath("report.html.jinja").read_text()
    batches = [
        {
            "batch": batch,
            "front": pareto_points(rows),
            "measured": len(rows),
            # ElementTree has escaped what is in them.
            "trade_off": Markup(trade_off(rows)),
            "shares": Markup(shares(rows)),
            "bases": sorted({row["language"]["basis"] for row in rows}),
        }
        for batch, rows in batches_of(profile).items()
    ]
    missed = [row for row in profile["rows"] if row["times"] is None]
    return environment.from_string(template).render(
        profile=profile, batches=batches, missed=missed, machine=machine(profile)
    )
