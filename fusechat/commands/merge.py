"""fusechat merge CONFIG.yml OUT [--threads N] [--max-memory SIZE] [--dry-run] [--resume] [--report] | --verify OUT

fusechat merge CONFIG.yml OUT --sweep --data FILE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def merge(
    config: Annotated[Path | None, typer.Argument(help="the merge in mergekit's YAML form", show_default=False)] = None,
    out: Annotated[Path | None, typer.Argument(help="directory of the merged model", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads; all allowed cores when absent")] = None,
    max_memory: Annotated[str | None, typer.Option(help="memory of the whole process, such as 100MB")] = None,
    dry_run: Annotated[bool, typer.Option(help="check everything and print what the merge would need")] = False,
    resume: Annotated[bool, typer.Option(help="go on with a merge that was interrupted")] = False,
    allow_nonfinite: Annotated[bool, typer.Option(help="keep the base's value where an input is NaN")] = False,
    shard_size: Annotated[str, typer.Option(help="largest size of one output file")] = "5GB",
    report: Annotated[bool, typer.Option(help="print the numbers of every tensor")] = False,
    ray: Annotated[str | None, typer.Option(help="address of a Ray cluster, or local: shards as tasks")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cuda: sce in blocks on a GPU")] = "cpu",
    sweep: Annotated[bool, typer.Option("--sweep", help="try the merges under `sweep`, keep the best")] = False,
    data: Annotated[
        str | None, typer.Option(help="--sweep: validation dialogues, neither trained nor tested on")
    ] = None,
    separator: Annotated[
        list[str] | None, typer.Option(help="--sweep: what separates documents in a text file")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="--sweep: cut running text into pieces of so many bytes")
    ] = None,
    keep_all: Annotated[bool, typer.Option("--keep-all", help="--sweep: keep the other merges in OUT.sweep")] = False,
    verify: Annotated[Path | None, typer.Option(help="check a merged model against its checksums")] = None,
) -> None:
    """Merge models into one, tensor by tensor, in constant memory."""
    from fusechat.errors import ConfigError
    from fusechat.merge.size import parse_size

    if verify is not None:
        from fusechat.merge.verify import verify as verify_merge

        count = verify_merge(verify)
        typer.echo(f"{verify}: {count} files match their checksums")
        return
    if config is None or out is None:
        raise ConfigError("fusechat merge needs CONFIG.yml and OUT, or --verify OUT")
    from fusechat.merge import merge as merge_models
    from fusechat.merge.report import needs, tensor_table

    options: dict[str, Any] = {
        "threads": threads,
        "max_memory_bytes": None if max_memory is None else parse_size(max_memory),
        "resume": resume,
        "allow_nonfinite": allow_nonfinite,
        "max_shard_bytes": parse_size(shard_size),
        "ray": ray,
        "device": device,
    }
    if sweep:
        if data is None:
            raise ConfigError("--sweep needs --data FILE: dialogues that were neither trained nor will be tested on")
        _sweep(config, out, data, separator, max_bytes, options | {"keep_all": keep_all})
        return

    def run(progress: Any) -> dict[str, Any]:
        return merge_models(config, out, dry_run=dry_run, progress=progress, **options)

    if dry_run:
        typer.echo(needs(run(None), out))
        return
    if sys.stderr.isatty():
        from fusechat.commands.progress import terminal_reporter

        with terminal_reporter() as reporter:
            provenance = run(reporter.stage("merge", "bytes"))
            reporter.done("merge", f"{provenance['n_tensors']} tensors in {out}")
    else:  # without a bar to draw, a small merge need not pay for the library that draws it
        provenance = run(None)
        typer.echo(f"{provenance['n_tensors']} tensors in {out}", err=True)
    for warning in provenance["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    if report:
        typer.echo(tensor_table(out))


def _sweep(
    config: Path, out: Path, data: str, separator: list[str] | None, max_bytes: int | None, options: dict[str, Any]
) -> None:
    from fusechat.commands.progress import terminal_reporter
    from fusechat.commands.sweep import print_sweep
    from fusechat.dialogue import load_dialogues
    from fusechat.merge.sweep import load_sweep, sweep

    recipe, entries = load_sweep(config)
    dialogues = load_dialogues(data, separator=separator, max_bytes=max_bytes)
    with terminal_reporter() as reporter:
        table = sweep(recipe, entries, out, dialogues, progress=reporter.stage("sweep", "merges"), **options)
        reporter.done("sweep", f"best of {len(table['merges'])} in {out}")
    print_sweep(table)
