"""The command line: one light module per command in fusechat/commands; what a command needs it imports when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from fusechat.commands.align import align
from fusechat.commands.bench import bench
from fusechat.commands.compare import compare
from fusechat.commands.demo import demo
from fusechat.commands.evaluate import app as evaluate
from fusechat.commands.extract import extract
from fusechat.commands.info import info
from fusechat.commands.inspect import inspect
from fusechat.commands.keys import with_keys
from fusechat.commands.merge import merge
from fusechat.commands.plan import plan
from fusechat.commands.profile import profile
from fusechat.commands.recipe import recipe
from fusechat.commands.report import report
from fusechat.commands.run import run
from fusechat.commands.train import train

app = typer.Typer(
    name="fusechat",
    help="Fuse chat LLMs of different tokenizers, sizes and architectures into one.",
    epilog="Any command takes --debug, which shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from fusechat import __version__

        typer.echo(f"fusechat {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print fusechat's; `info` says the rest")
    ] = False,
) -> None:
    pass


app.command()(demo)
app.command()(run)
app.command()(plan)
app.command(cls=with_keys("ExtractConfig"))(extract)
app.command()(align)
app.command(cls=with_keys("TrainConfig"))(train)


@app.command(
    "merge", add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
def _merge(context: typer.Context) -> None:
    """Merge models into one, tensor by tensor, in constant memory."""
    merge(context.args)


app.add_typer(evaluate)
app.command()(report)
app.command()(compare)
app.command()(bench)
app.command()(profile)
app.command()(inspect)
app.command()(recipe)
app.command()(info)
