"""The commands ``vlm-fast data ...``."""

from __future__ import annotations

import typer

from vlm_fast.cli.data_check import check
from vlm_fast.cli.data_generate import generate

data = typer.Typer(
    name="data",
    help="Conversations about pictures: check them, generate them.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
for command in (check, generate):
    data.command()(command)
