"""Tasks of lm-eval through the harness's own Python API, with each metric's standard error as an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fusechat.checkpoint import resolve_model
from fusechat.errors import ConfigError, FusechatError, first_line


def evaluate_tasks(
    models: Mapping[str, Path | str],
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    batch_size: int | str = 8,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Return every metric of every task by model, with its standard error and the number of samples, as JSON values.

    `include` is a folder of the user's own task files. Raises ConfigError for unknown tasks, FusechatError when the
    harness is not installed or fails.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise FusechatError(f"tasks need the harness lm-eval ({error}): pip install 'fusechat[tasks]'") from error
    if device == "auto":  # the harness takes "cuda" whether there is one or not
        device = "cuda" if torch.cuda.is_available() else "cpu"
    directories = {name: resolve_model(str(model)) for name, model in models.items()}
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(
            f"lm-eval knows no task {', '.join(unknown)}: `lm-eval ls tasks` lists them, --include adds your own"
        )
    results: dict[str, Any] = {}
    for name, directory in directories.items():
        try:
            found = simple_evaluate(
                model="hf",
                model_args={"pretrained": str(directory), "dtype": dtype},
                tasks=list(tasks),
                task_manager=manager,
                num_fewshot=few_shot,
                limit=limit,
                apply_chat_template=apply_chat_template,
                batch_size=batch_size,
                device=device,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                log_samples=False,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise FusechatError(f"lm-eval fails on {name}: {first_line(error)}") from error
        results[name] = {
            task: {"samples": int(found["n-samples"][task]["effective"]), "metrics": _metrics(values)}
            for task, values in found["results"].items()
            if task in found["n-samples"]  # groups are means of their tasks
        }
    return {"limit": limit, "few_shot": few_shot, "models": results}


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return {"metric,filter": {value, standard_error}} of the harness's flat row."""
    out = {}
    for key, value in values.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filter_name}")
        out[key] = {"value": float(value), "standard_error": float(error) if isinstance(error, int | float) else None}
    return out
