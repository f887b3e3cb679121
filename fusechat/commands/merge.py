"""fusechat merge CONFIG.yml OUT [--threads N] [--max-memory SIZE] [--dry-run] [--resume] [--report] | --verify OUT"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

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

    def run(progress: object) -> dict[str, object]:
        return merge_models(
            config,
            out,
            threads=threads,
            max_memory_bytes=None if max_memory is None else parse_size(max_memory),
            dry_run=dry_run,
            resume=resume,
            allow_nonfinite=allow_nonfinite,
            max_shard_bytes=parse_size(shard_size),
            ray=ray,
            progress=progress,  # type: ignore[arg-type]
        )

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
    for warning in provenance["warnings"]:  # type: ignore[attr-defined]
        typer.echo(f"warning: {warning}", err=True)
    if report:
        typer.echo(tensor_table(out))
