"""``vlm-fast data``: what connectors are trained on."""

from __future__ import annotations

import typer

from vlm_fast.data.check_command import check

data = typer.Typer(
    name="data",
    help="Conversations about pictures: check them.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
data.command()(check)
