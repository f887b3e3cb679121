"""fusechat extract MODEL --data FILE --out STORE [key=value ...]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fusechat.commands import data_options as reading


def extract(
    model: Annotated[str, typer.Argument(help="directory or hub id", show_default=False)],
    data: Annotated[str, typer.Option(help="file or hub id of the dialogues", show_default=False)],
    out: Annotated[Path, typer.Option(help="directory of the store", show_default=False)],
    backend: Annotated[
        Literal["hf", "vllm", "vllm-server"], typer.Option(help="transformers, vLLM, or vLLM servers over HTTP")
    ] = "hf",
    top_k: Annotated[int, typer.Option(help="log-probabilities kept per row", min=1)] = 10,
    template: Annotated[
        str, typer.Option(help="own, or whose template to use: pivot:PATH, a tokenizer directory or .jinja file")
    ] = "own",
    max_length: Annotated[int, typer.Option(help="tokens; longer dialogues are cut at a turn", min=2)] = 2048,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    tensor_parallel: Annotated[
        int | None, typer.Option(help="vllm: GPUs one engine spreads over; default: as few as hold the model", min=1)
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="vllm: what the checkpoint does not say itself")] = None,
    engines: Annotated[int | None, typer.Option(help="engines at once; default: as the GPUs allow", min=1)] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the Python that comes with the model: read it first")
    ] = False,
    server: Annotated[list[str] | None, typer.Option(help="vllm-server: its URL; may be given several times")] = None,
    ray: Annotated[str | None, typer.Option(help="address of a Ray cluster, or local")] = None,
    format: reading.Format = "auto",
    separator: reading.Separator = None,
    max_bytes: reading.MaxBytes = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="other keys such as fast_driver=true engine_args.seed=1; --help lists them"),
    ] = None,
) -> None:
    """Write a model's top-k next-token log-probabilities over a dialogue set.

    A server's API key is read from the environment variable OPENAI_API_KEY; api_key_env=NAME names another.
    """
    from fusechat.commands.progress import terminal_reporter
    from fusechat.config import parse_extract
    from fusechat.dialogue import load_dialogues
    from fusechat.extract import extract as extract_store
    from fusechat.extract import left_out

    if server and backend != "vllm-server":
        raise typer.BadParameter("--server needs --backend vllm-server")
    config = parse_extract(
        {
            "backend": backend,
            "top_k": top_k,
            "template": template,
            "max_length_tokens": max_length,
            "dtype": dtype,
            "tensor_parallel_size": tensor_parallel,
            "quantization": quantization,
            "engines": engines,
            "trust_remote_code": trust_remote_code,
            "servers": server or [],
            "ray": ray,
        },
        [override.removeprefix("extract.") for override in overrides or []],
    )
    dialogues = load_dialogues(data, format=format, separator=separator, max_bytes=max_bytes)
    with terminal_reporter() as reporter:
        manifest = extract_store(model, dialogues, out, config, progress=reporter.stage("extract", "tokens"))
        rows = sum(shard["n_rows"] for shard in manifest["shards"])
        reporter.done("extract", f"{rows:,} rows in {out}{left_out(manifest)}")
