"""fusechat eval: one light module per subcommand."""

from __future__ import annotations

import typer

from fusechat.commands.evaluate.agreement import agreement
from fusechat.commands.evaluate.alpaca import alpaca, winrates
from fusechat.commands.evaluate.answers import answers
from fusechat.commands.evaluate.bpb import bpb
from fusechat.commands.evaluate.judge import judge, ratings
from fusechat.commands.evaluate.tasks import tasks

app = typer.Typer(name="eval", help="Evaluate models, with intervals.", no_args_is_help=True)

app.command()(bpb)
app.command()(agreement)
app.command()(answers)
app.command()(judge)
app.command()(ratings)
app.command()(alpaca)
app.command()(winrates)
app.command()(tasks)
