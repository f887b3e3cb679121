"""fusechat eval alpaca OUTPUTS... --judge-url URL --judge-model NAME; fusechat eval winrates ANNOTATIONS..."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fusechat.commands.evaluate import comparison_options as comparing
from fusechat.commands.evaluate import endpoint_options as options
from fusechat.commands.json_out import JsonOut, tell

Reference = Annotated[Path, typer.Option(help="the reference's model_outputs.json", show_default=False)]
Gamed = Annotated[Path | None, typer.Option(help="df_gamed.csv; without it no length control")]


def alpaca(
    outputs: Annotated[list[Path], typer.Argument(help="alpaca_eval model outputs, one a model", show_default=False)],
    reference: Reference,
    judge_url: options.JudgeUrl,
    judge_model: options.JudgeModel,
    out: Annotated[Path, typer.Option(help="folder of replies and annotations")] = Path("alpaca_eval"),
    gamed: Gamed = None,
    concurrency: options.Concurrency = 8,
    requests_per_minute: options.RequestsPerMinute = None,
    timeout: options.Timeout = 300.0,
    retries: options.Retries = 5,
    api_key_env: options.ApiKeyEnv = options.KEY_NAME,
    request_field: options.RequestFields = None,
    against: comparing.Against = None,
    confidence: comparing.Confidence = 0.95,
    json_out: JsonOut = None,
) -> None:
    """AlpacaEval 2.0: a judge's preferences against the reference; run again, it goes on where it stopped."""
    from fusechat.artifact import write_json
    from fusechat.commands.evaluate.names import output_names, require_among
    from fusechat.commands.progress import terminal_reporter
    from fusechat.evaluate.alpaca import annotate

    judge = options.endpoint(
        judge_url,
        judge_model,
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
        timeout=timeout,
        retries=retries,
        api_key_env=api_key_env,
        fields=request_field,
    )
    files, annotations = output_names(outputs), {}
    require_among(against, files)
    with terminal_reporter() as reporter:
        for name, path in files.items():
            folder = out / name
            replies = folder / "replies.jsonl"
            advance = reporter.stage(f"judge {name}", "preferences")
            annotations[name] = annotate(path, reference=reference, replies=replies, endpoint=judge, progress=advance)
            write_json(folder / "annotations.json", annotations[name])
            reporter.done(f"judge {name}", f"{len(annotations[name])} preferences in {folder}/annotations.json")
    _report(annotations, reference, gamed, against, confidence, json_out)


def winrates(
    annotations: Annotated[list[Path], typer.Argument(help="alpaca_eval annotation files", show_default=False)],
    reference: Reference,
    gamed: Gamed = None,
    against: comparing.Against = None,
    confidence: comparing.Confidence = 0.95,
    json_out: JsonOut = None,
) -> None:
    """Win rates of annotations that are there already, alpaca_eval's own files among them."""
    from fusechat.commands.evaluate.names import require_among
    from fusechat.errors import ConfigError
    from fusechat.evaluate.alpaca import load_annotations

    by_name = {str(rows[0]["generator_2"]): rows for rows in map(load_annotations, annotations)}
    if len(by_name) < len(annotations):
        raise ConfigError("two of the files are of the same model (generator_2)")
    require_among(against, by_name)
    _report(by_name, reference, gamed, against, confidence, json_out)


def _report(
    annotations: dict[str, list[dict[str, Any]]],
    reference: Path,
    gamed: Path | None,
    against: str | None,
    confidence: float,
    json_out: Path | None,
) -> None:
    from fusechat.commands.progress import terminal_reporter
    from fusechat.evaluate.alpaca import load_outputs
    from fusechat.evaluate.win_rates import win_rates

    with terminal_reporter() as reporter:
        advance = reporter.stage("length control", "fits") if gamed is not None else None
        results = win_rates(
            annotations,
            reference=load_outputs(reference),
            gamed=gamed,
            against=against,
            confidence=confidence,
            progress=advance,
        )
        if gamed is not None:
            reporter.done("length control", f"{len(annotations)} models")
    tell(results, json_out, _print)


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fusechat.commands.results import with_interval

    console = Console()
    models = results["models"]
    rates = {"win_rate": ("win rate", "interval")}
    if any("length_controlled_interval" in model for model in models.values()):
        rates["length_controlled_winrate"] = ("length-controlled", "length_controlled_interval")
    difference = next(k for k in next(iter(models.values()))["interval"] if k.startswith("difference_to_"))
    against = difference.removeprefix("difference_to_")

    def table(*headings: str) -> Table:
        made = Table(pad_edge=False, box=None, padding=(0, 0, 0, 1))
        made.add_column("", overflow="fold")
        for heading in headings:
            made.add_column(heading, justify="right", no_wrap=True)
        return made

    headings = [heading for heading, _ in rates.values()]
    levels, differences = table(*headings, "judged", "chars"), table(*headings)
    for name, model in models.items():
        cells = [with_interval(model[where][key], digits=2) for key, (_, where) in rates.items()]
        levels.add_row(name, *cells, str(model["n_total"]), str(model["avg_length"]))
        pairs = [(model[where][difference], model[where]["p_holm"]) for _, where in rates.values()]
        if name != against:
            differences.add_row(name, *(with_interval(gap, p, signed=True, digits=2) for gap, p in pairs))
    console.print("[bold]win rate against the reference[/bold], percent")
    console.print(levels)
    unparsable = sum(model["unparsable"] for model in models.values())
    if unparsable:
        console.print(f"{unparsable} replies without a preference are in no figure", style="yellow")
    if len(rates) == 1:
        console.print("no length control: give --gamed df_gamed.csv", style="dim")
    if len(models) > 1:
        console.print(f"\n[bold]difference to {against}[/bold], paired by instruction", highlight=False)
        console.print(differences)
    console.print(
        f"{results['n_instructions']} instructions. ±: half the interval: of win rates by bootstrap, of\n"
        "length-controlled rates by jackknife with the length model fitted anew."
        + ("\n*: p < 0.05, paired, adjusted for the number of models (Holm)." if len(models) > 1 else ""),
        highlight=False,
        style="dim",
    )
