"""The options of every command that asks an OpenAI-compatible server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fusechat.evaluate.endpoint import Endpoint

JudgeUrl = Annotated[str, typer.Option(help="an OpenAI-compatible API, .../v1", show_default=False)]
JudgeModel = Annotated[str, typer.Option(help="the judge's name there", show_default=False)]
Concurrency = Annotated[int, typer.Option(help="requests at a time", min=1)]
RequestsPerMinute = Annotated[float | None, typer.Option(help="no more than so many", min=0.01)]
Timeout = Annotated[float, typer.Option(help="seconds to wait for one answer", min=0.1)]
Retries = Annotated[int, typer.Option(help="of a request", min=0)]
ApiKeyEnv = Annotated[str, typer.Option(help="environment variable with the key, where one is wanted")]
RequestFields = Annotated[
    list[str] | None,
    typer.Option("--request-field", help="into every request, as top_p=0.9 or max_tokens=null; repeatable"),
]
KEY_NAME = "OPENAI_API_KEY"


def endpoint(
    url: str,
    model: str,
    *,
    concurrency: int,
    requests_per_minute: float | None,
    timeout: float,
    retries: int,
    api_key_env: str,
    fields: list[str] | None,
) -> Endpoint:
    """Return the endpoint of a command's options, with the key from the environment."""
    from fusechat.commands.evaluate.names import key_values
    from fusechat.evaluate.endpoint import Endpoint

    return Endpoint(
        url=url,
        model=model,
        api_key=os.environ.get(api_key_env),
        api_key_name=api_key_env,
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
        timeout_s=timeout,
        retries=retries,
        fields=key_values(fields or []),
    )
