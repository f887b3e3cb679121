"""fusechat eval tasks MODEL... --tasks NAME,NAME"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fusechat.commands.json_out import JsonOut, tell


def tasks(
    models: Annotated[list[str], typer.Argument(help="directories or hub ids", show_default=False)],
    tasks: Annotated[str, typer.Option(help="names of lm-eval tasks, with commas", show_default=False)],
    include: Annotated[Path | None, typer.Option(help="folder of your own task files")] = None,
    few_shot: Annotated[int | None, typer.Option(help="examples in the prompt; the task's own unless given")] = None,
    limit: Annotated[int | None, typer.Option(help="only so many samples a task", min=1)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="render prompts in the model's chat template")] = False,
    batch_size: Annotated[str, typer.Option(help="a number, or auto")] = "8",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cuda, cpu, ...")] = "auto",
    seed: Annotated[int, typer.Option(help="of the harness", min=0, max=2**32 - 1)] = 0,
    json_out: JsonOut = None,
) -> None:
    """Tasks of the lm-eval harness."""
    from fusechat.commands.evaluate.names import model_names
    from fusechat.evaluate.tasks import evaluate_tasks

    results = evaluate_tasks(
        model_names(models),
        [name.strip() for name in tasks.split(",") if name.strip()],
        include=include,
        few_shot=few_shot,
        limit=limit,
        apply_chat_template=chat,
        batch_size=int(batch_size) if batch_size.isdigit() else batch_size,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    tell(results, json_out, _print)


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fusechat.commands.results import with_interval

    console = Console()
    models = results["models"]
    table = Table(pad_edge=False, box=None, padding=(0, 0, 0, 1))
    for heading in ("task", "metric"):
        table.add_column(heading, overflow="fold")
    for name in models:
        table.add_column(name, justify="right", overflow="fold")
    for task, content in next(iter(models.values())).items():
        for metric in content["metrics"]:
            cells = []
            for by_task in models.values():
                one = by_task[task]["metrics"][metric]
                value, half = one["value"], 1.96 * (one["standard_error"] or 0.0)
                known = one["standard_error"] is not None
                cells.append(with_interval([value, value - half, value + half]) if known else f"{value:.3f} ")
            table.add_row(task, metric.removesuffix(",none"), *cells)
    console.print(table)
    console.print("±: 1.96 of lm-eval's standard errors, where it has one", highlight=False, style="dim")
