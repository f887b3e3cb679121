"""fusechat merge CONFIG.yml OUT [--threads N] [--max-memory SIZE] [--dry-run] [--resume] [--report] | --verify OUT

fusechat merge CONFIG.yml OUT --sweep --data FILE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    """Return what the command understands, by argparse: larger libraries take longer to load than a small merge."""
    options = argparse.ArgumentParser(
        prog="fusechat merge",
        allow_abbrev=False,
        description="Merge models into one, tensor by tensor, in constant memory.",
    )
    add = options.add_argument
    add("config", nargs="?", metavar="CONFIG", help="the merge in mergekit's YAML form, or recipe:NAME")
    add("out", type=Path, nargs="?", metavar="OUT", help="directory of the merged model")
    add("--threads", type=_at_least_one, metavar="N", help="threads; all allowed cores when absent")
    add("--max-memory", metavar="SIZE", help="memory of the whole process, such as 100MB")
    add("--dry-run", action="store_true", help="check everything and print what the merge would need")
    add("--resume", action="store_true", help="refuse to begin anew where OUT.partial is of other inputs")
    add("--allow-nonfinite", action="store_true", help="keep the base's value where an input is NaN (linear, slerp: 0)")
    add("--shard-size", metavar="SIZE", default="5GB", help="largest size of one output file (5GB)")
    add("--report", action="store_true", help="print the numbers of every tensor")
    add("--ray", metavar="ADDRESS", help="address of a Ray cluster, or local: shards as tasks")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: sce in blocks on a GPU")
    add("--sweep", action="store_true", help="try the merges under `sweep`, keep the best")
    add("--data", metavar="FILE", help="--sweep: validation dialogues, neither trained nor tested on")
    add("--format", choices=["auto", "sharegpt", "messages", "alpaca", "text"], help="--sweep: layout of the data")
    add("--template", metavar="NAME", help="--sweep: own (as when absent), plain, a .jinja file, or a model's")
    add("--separator", action="append", metavar="TEXT", help="--sweep: what separates documents in a text file")
    add("--max-bytes", type=int, metavar="N", help="--sweep: cut running text into pieces of so many bytes")
    add("--keep-all", action="store_true", help="--sweep: keep the other merges in OUT.sweep")
    add("--verify", type=Path, metavar="OUT", help="check a merged model against its checksums")
    return options


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def merge(arguments: Sequence[str]) -> None:
    """Run the command with its arguments."""
    from fusechat.errors import ConfigError
    from fusechat.quantity import parse_size

    given = parser().parse_args(arguments)
    _check_together(given)
    if given.verify is not None:
        from fusechat.merge.verify import verify

        count = verify(given.verify)
        print(f"{given.verify}: {count} files match their checksums")
        return
    if given.config is None or given.out is None:
        raise ConfigError("fusechat merge needs CONFIG.yml and OUT, or --verify OUT")
    from fusechat.merge import merge as merge_models
    from fusechat.merge.report import needs, tensor_table
    from fusechat.recipe import recipe_path

    config = recipe_path(given.config, merge=True)

    options: dict[str, Any] = {
        "threads": given.threads,
        "max_memory_bytes": None if given.max_memory is None else parse_size(given.max_memory),
        "resume": given.resume,
        "allow_nonfinite": given.allow_nonfinite,
        "max_shard_bytes": parse_size(given.shard_size),
        "ray": given.ray,
        "device": given.device,
    }
    if given.sweep:
        options |= {"keep_all": given.keep_all, "template": given.template or "own"}
        data = {"format": given.format or "auto", "separator": given.separator, "max_bytes": given.max_bytes}
        _sweep(config, given.out, given.data, data, options)
        return

    def run(progress: Any) -> dict[str, Any]:
        return merge_models(config, given.out, dry_run=given.dry_run, progress=progress, **options)

    if given.dry_run:
        print(needs(run(None), given.out))
        return
    if sys.stderr.isatty():
        from fusechat.commands.progress import terminal_reporter

        with terminal_reporter() as reporter:
            provenance = run(reporter.stage("merge", "bytes"))
            reporter.done("merge", f"{provenance['n_tensors']} tensors in {given.out}")
    else:  # without a bar to draw, a small merge need not pay for the library that draws it
        provenance = run(None)
        print(f"{provenance['n_tensors']} tensors in {given.out}", file=sys.stderr)
    for warning in provenance["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if given.report:
        print(tensor_table(given.out))


_OF_A_SWEEP = ("data", "format", "template", "separator", "max_bytes", "keep_all")
_OF_ONE_MERGE = ("dry_run", "report")


def _check_together(given: argparse.Namespace) -> None:
    """Raise ConfigError for options that would not be followed."""
    from fusechat.errors import ConfigError

    if given.verify is not None:
        alone = vars(parser().parse_args(["--verify", ""]))
        others = [name for name, value in vars(given).items() if name != "verify" and value != alone[name]]
        if others:
            raise ConfigError(f"--verify OUT merges nothing: leave out {_option(others[0])}, or --verify")
        return
    if given.sweep and given.data is None:
        raise ConfigError("--sweep needs --data FILE: dialogues that were neither trained nor will be tested on")
    for name in _OF_ONE_MERGE if given.sweep else _OF_A_SWEEP:
        if getattr(given, name):
            why = "is of one merge, not of a --sweep" if given.sweep else "is of a --sweep"
            raise ConfigError(f"{_option(name)} {why}: leave it out")
    if given.dry_run and given.report:
        raise ConfigError("--report is of a merge that is made, not of a --dry-run: leave one out")


def _option(name: str) -> str:
    return name.upper() if name in ("config", "out") else f"--{name.replace('_', '-')}"


def _sweep(config: Path, out: Path, data: str, reading: dict[str, Any], options: dict[str, Any]) -> None:
    from fusechat.commands.progress import terminal_reporter
    from fusechat.commands.sweep import print_sweep
    from fusechat.dialogue import load_dialogues
    from fusechat.merge.sweep import load_sweep, sweep

    recipe, entries = load_sweep(config)
    dialogues = load_dialogues(data, **reading)
    with terminal_reporter() as reporter:
        table = sweep(recipe, entries, out, dialogues, progress=reporter.stage("sweep", "merges"), **options)
        reporter.done("sweep", f"best of {len(table['merges'])} in {out}")
    print_sweep(table)
