"""fusechat eval: one light module per subcommand."""

from __future__ import annotations

import typer

from fusechat.commands.evaluate.agreement import agreement
from fusechat.commands.evaluate.bpb import bpb
from fusechat.commands.evaluate.judge import judge, ratings

app = typer.Typer(name="eval", help="Evaluate models, with intervals.", no_args_is_help=True)

app.command()(bpb)
app.command()(agreement)
app.command()(judge)
app.command()(ratings)
