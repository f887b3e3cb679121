"""fusechat eval answers MODEL --benchmark mt-bench|alpaca|FILE --backend hf|vllm|server"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fusechat.commands.evaluate import endpoint_options as options

if TYPE_CHECKING:
    from fusechat.evaluate.answers import Writer

_BLOCKS = {"hf": 8, "vllm": 128}
_BACKENDS_OF = {
    "template": ("hf", "vllm"), "batch_size": ("hf", "vllm"), "dtype": ("hf", "vllm"), "engine_arg": ("vllm",),
    "concurrency": ("server",), "requests_per_minute": ("server",), "timeout": ("server",), "retries": ("server",),
    "api_key_env": ("server",), "request_field": ("server",),
}  # fmt: skip
# What vLLM is given by options of their own.
_NO_ENGINE_ARGS = {
    "model": "MODEL", "template": "--template", "backend": "--backend", "dtype": "--dtype", "block": "--batch-size",
}  # fmt: skip


def answers(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="directory or hub id; with --backend server its name there", show_default=False)
    ],
    benchmark: Annotated[str, typer.Option(help="mt-bench, alpaca, or a file of either form", show_default=False)],
    out: Annotated[Path, typer.Option(help="MODEL.jsonl for mt-bench, .json for alpaca", show_default=False)],
    questions: Annotated[Path | None, typer.Option(help="your copy of mt-bench's or alpaca's questions")] = None,
    backend: Annotated[Literal["hf", "vllm", "server"], typer.Option(help="what runs the model")] = "hf",
    name: Annotated[str | None, typer.Option(help="model_id or generator in the file; else the last of MODEL")] = None,
    template: Annotated[str, typer.Option(help="own, a .jinja file, or a model's; hf and vllm")] = "own",
    max_tokens: Annotated[int | None, typer.Option(help="of an answer; 1024 mt-bench, 2048 alpaca", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="of every answer; else by category, or 0", min=0)] = None,
    seed: Annotated[int, typer.Option(help="of the sampling", min=0, max=2**32 - 1)] = 0,
    batch_size: Annotated[int | None, typer.Option(help="questions at a time; 8 hf, 128 vllm", min=1)] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; hf and vllm")] = "auto",
    engine_arg: Annotated[list[str] | None, typer.Option(help="vllm's, as tensor_parallel_size=2; repeatable")] = None,
    url: Annotated[str | None, typer.Option(help="of the server, .../v1")] = None,
    concurrency: options.Concurrency = 8,
    requests_per_minute: options.RequestsPerMinute = None,
    timeout: options.Timeout = 300.0,
    retries: options.Retries = 5,
    api_key_env: options.ApiKeyEnv = options.KEY_NAME,
    request_field: options.RequestFields = None,
) -> None:
    """A model's answers to a benchmark, for a judge; run again, it goes on where it stopped."""
    from fusechat.commands.evaluate.names import key_values
    from fusechat.commands.progress import terminal_reporter
    from fusechat.errors import ConfigError
    from fusechat.evaluate.answers import TOO_LONG, answer_benchmark, local_answerer
    from fusechat.evaluate.benchmark import load_benchmark

    if (backend == "server") != (url is not None):
        raise ConfigError("--backend server and --url URL belong together")
    _check_together(context, backend)
    asked = load_benchmark(benchmark, questions)
    if backend == "server":
        answerer = {"backend": backend, "url": url, "model": model, "fields": key_values(request_field or [])}
    else:
        block = batch_size or _BLOCKS[backend]
        engine = key_values(engine_arg or [])
        for key, option in _NO_ENGINE_ARGS.items():
            if key in engine:
                raise ConfigError(f"--engine-arg {key} is no argument of the engine's alone: give it as {option}")
        # One seed of torch's is for a batch; vLLM has one for each question.
        batch = {"batch_size": block} if backend == "hf" else {}
        answerer = local_answerer(model, template, backend=backend, dtype=dtype, **batch, **engine)

    def writer() -> Writer:
        if backend == "hf":
            from fusechat.evaluate.write_hf import HfWriter

            return HfWriter(model, template=template, block=block, dtype=dtype)
        if backend == "vllm":
            from fusechat.evaluate.write_vllm import VllmWriter

            return VllmWriter(model, template=template, block=block, dtype=dtype, **engine)
        from fusechat.evaluate.write_server import ServerWriter

        assert url is not None
        return ServerWriter(
            options.endpoint(
                url,
                model,
                concurrency=concurrency,
                requests_per_minute=requests_per_minute,
                timeout=timeout,
                retries=retries,
                api_key_env=api_key_env,
                fields=request_field,
            )
        )

    with terminal_reporter() as reporter:
        ended = answer_benchmark(
            asked,
            writer,
            out,
            model_id=name or Path(model).name,
            answerer=answerer,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            progress=reporter.stage("answer", "questions" if backend == "server" else "batches"),
        )
        cut = f", {ended['length']} cut at the length limit" if ended["length"] else ""
        failed = f", {ended[TOO_LONG]} not asked: the prompt does not fit the context" if ended[TOO_LONG] else ""
        reporter.done("answer", f"{len(asked.questions)} questions, {ended.total()} answers{cut}{failed}: {out}")


def _check_together(context: typer.Context, backend: str) -> None:
    """Raise ConfigError for options that the backend would not follow."""
    from fusechat.errors import ConfigError

    for name, backends in _BACKENDS_OF.items():
        source = context.get_parameter_source(name)
        if backend not in backends and source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is for --backend {' or '.join(backends)}, not {backend}: leave it out")
