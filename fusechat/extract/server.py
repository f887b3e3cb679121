"""The vllm-server backend: prompt log-probabilities over HTTP, from a server that lives elsewhere.

`POST /v1/completions` takes token ids and `prompt_logprobs`, which vLLM adds to OpenAI's interface. The API key, where
a server wants one, is in the environment variable that `api_key_env` names.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from fusechat.artifact import Json
from fusechat.checkpoint import hub_id
from fusechat.config import ExtractConfig
from fusechat.errors import DataError
from fusechat.extract.engines import EngineLostError
from fusechat.extract.probe import Probe
from fusechat.extract.scores import Advance, RowScores, Scorer, rows_of_prompt
from fusechat.extract.task import Task
from fusechat.http_reply import reply_text
from fusechat.records import Encoded

_RETRIES = 5
_BACKOFF_S = 0.5  # doubled with every attempt
_CONNECT_S = 10.0
# A server that is full, restarting, or behind a proxy that is.
_PASSING = (408, 429, 500, 502, 503, 504)
_MINUS_INFINITY = -9999.0  # JSON has none: vLLM's server writes this


class Endpoint:
    """One server: its URL, the model it serves, and a session for each thread."""

    def __init__(self, url: str, *, timeout_s: float, api_key_env: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout_s = timeout_s
        self.api_key_env = api_key_env
        self.api_key = os.environ.get(api_key_env)
        self.retry = Retry(
            total=_RETRIES,
            backoff_factor=_BACKOFF_S,
            backoff_jitter=_BACKOFF_S,
            status_forcelist=_PASSING,
            allowed_methods=None,  # scoring changes nothing, so a POST may be repeated
            raise_on_status=False,
        )
        self._of_thread = threading.local()

    def _session(self) -> requests.Session:
        if not hasattr(self._of_thread, "session"):
            session = requests.Session()
            session.mount("http://", HTTPAdapter(max_retries=self.retry))
            session.mount("https://", HTTPAdapter(max_retries=self.retry))
            if self.api_key:
                session.headers["Authorization"] = f"Bearer {self.api_key}"
            self._of_thread.session = session
        session = self._of_thread.session
        assert isinstance(session, requests.Session)
        return session

    def ask(self, method: str, path: str, body: Json | None = None) -> Any:
        """Return the JSON answer.

        Raises EngineLostError when the server cannot be reached or keeps failing, DataError when it refuses the
        request or its answer is not JSON.
        """
        try:
            answer = self._session().request(method, self.url + path, json=body, timeout=(_CONNECT_S, self.timeout_s))
        except requests.RequestException as error:
            reason = type(error).__name__
            raise EngineLostError(f"{self.url} does not answer ({reason}): is the server up?") from error
        said = reply_text(answer, self.api_key) if answer.status_code >= 400 else ""
        if answer.status_code in _PASSING:
            raise EngineLostError(f"{self.url} keeps answering {answer.status_code}: {said}")
        if answer.status_code in (401, 403):
            mend = "correct the one in" if self.api_key else "put it into the environment variable"
            raise DataError(f"{self.url} wants an API key ({answer.status_code}): {mend} {self.api_key_env}")
        if answer.status_code >= 400:
            raise DataError(f"{self.url}{path} refuses ({answer.status_code}): {said}")
        try:
            return answer.json()
        except requests.JSONDecodeError as error:
            raise DataError(
                f"{self.url}{path} answers with something that is not JSON: is it a vLLM server?"
            ) from error


@contextmanager
def open_server(task: Task, *, url: str, probe: Probe) -> Iterator[Scorer]:
    """Give the scorer of one server, which is checked to serve the task's model when it is given its first shard.

    The scorer raises DataError, naming both sides, for a server of another model or one that is no vLLM server, and
    EngineLostError when the server does not answer.
    """
    endpoint = _endpoint(url, task.config)
    engine: Json = {"name": "vllm-server", "url": endpoint.url, "dtype": task.dtype}
    with ThreadPoolExecutor(task.config.concurrency) as pool:

        def score(encoded: Sequence[Encoded], dialogues: Sequence[int], advance: Advance) -> list[RowScores]:
            if "probe" not in engine:
                engine.update(check_model(endpoint, task))
                probed = prompt_logprobs(endpoint, engine["model"], task, probe.ids)[1][:, 0]
                probe.check(endpoint.url, probed)
                engine["probe"] = [round(float(logprob), 4) for logprob in probed]

            def one(member: Encoded) -> RowScores:
                rows = rows_of_prompt(*prompt_logprobs(endpoint, engine["model"], task, member.input_ids), member)
                advance(len(member.input_ids))
                return rows

            futures = [pool.submit(one, member) for member in encoded]
            try:
                return [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()

        yield Scorer(score=score, engine=engine)


def _endpoint(url: str, config: ExtractConfig) -> Endpoint:
    return Endpoint(url, timeout_s=config.timeout_s, api_key_env=config.api_key_env)


def check_servers(task: Task) -> None:
    """Raise what extraction would of a task's servers; one that does not answer is left to the others."""
    lost = []
    for url in task.config.servers:
        try:
            check_model(_endpoint(url, task.config), task)
        except EngineLostError as error:
            lost.append(error)
    if len(lost) == len(task.config.servers):
        raise lost[-1]


def check_model(endpoint: Endpoint, task: Task) -> Json:
    """Return the name under which an endpoint serves the task's model, and the server's version.

    Raises DataError when it serves only others, or a context too short for the task.
    """
    listed = endpoint.ask("GET", "/v1/models")
    try:
        served = {str(card["id"]): card for card in listed["data"]}
    except (TypeError, KeyError) as error:
        raise DataError(f"{endpoint.url} has no list of models: is it a vLLM server?") from error
    name = next((name for name, card in served.items() if _is_same(task, name, card)), None)
    if name is None:
        wanted = task.config.served_model or task.model
        raise DataError(
            f"{endpoint.url} serves {', '.join(served) or 'no model'}, not {wanted}: "
            "correct the URL, or set extract.served_model if that is its name there"
        )
    context = served[name].get("max_model_len")
    if isinstance(context, int) and context <= task.max_length_tokens:
        raise DataError(
            f"{endpoint.url} takes prompts of less than {context} tokens, extraction may need "
            f"{task.max_length_tokens}: start it with --max-model-len {task.max_length_tokens + 1}"
        )
    try:
        version = str(endpoint.ask("GET", "/version")["version"])
    except (DataError, KeyError, TypeError):
        version = ""
    return {"model": name, "version": version}


def _is_same(task: Task, name: str, card: Json) -> bool:
    if task.config.served_model is not None:
        return name == task.config.served_model
    model = task.model
    if not Path(model).expanduser().is_dir():
        model, _ = hub_id(model)
    ours = {model, str(task.directory), str(task.directory.resolve())}
    theirs = {name, str(card.get("root"))}
    return bool(ours & theirs) or Path(name).name == Path(model).name


def prompt_logprobs(
    endpoint: Endpoint, model: str, task: Task, input_ids: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return ids int32[T−1, K+1] and logprobs float32[T−1, K+1] of a sequence, the actual token's first.

    Raises as `Endpoint.ask` does, and DataError for an answer without prompt log-probabilities.
    """
    body = {
        "model": model,
        "prompt": input_ids.tolist(),
        "prompt_logprobs": task.config.top_k,
        "max_tokens": 1,
        "temperature": 0.0,
    }
    answer = endpoint.ask("POST", "/v1/completions", body)
    try:
        entries = answer["choices"][0].get("prompt_logprobs")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"{endpoint.url} answers with something that is not a completion") from error
    if not entries:
        raise DataError(
            f"{endpoint.url} gives no prompt_logprobs: it is not vLLM, or was started with --max-logprobs below "
            f"{task.config.top_k}"
        )
    return parse_entries(entries, input_ids, task.config.top_k, endpoint.url)


def parse_entries(
    entries: Sequence[Any], input_ids: npt.NDArray[np.int32], top_k: int, url: str
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Turn the JSON entries of a prompt into arrays; raises DataError when they are not of its tokens.

    An entry maps token ids to {logprob, rank}: the k likeliest, and the actual token's if it is none of them. −9999
    stands for −inf.
    """
    n = len(input_ids) - 1
    ids = np.zeros((n, top_k + 1), dtype=np.int32)
    logprobs = np.full((n, top_k + 1), -np.inf, dtype=np.float32)
    try:
        if len(entries) != n + 1:
            raise ValueError
        for row, (token, entry) in enumerate(zip(input_ids[1:].tolist(), entries[1:])):
            actual = entry[str(token)]
            ranked = sorted(entry.items(), key=lambda item: item[1]["rank"])
            if len(ranked) > top_k:
                ranked = [item for item in ranked if item[0] != str(token)]
            ids[row] = [token, *(int(key) for key, _ in ranked)]
            logprobs[row] = [actual["logprob"], *(value["logprob"] for _, value in ranked)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{url} gives prompt log-probabilities that are not the {top_k} likeliest of each token it was sent"
        ) from error
    logprobs[logprobs <= _MINUS_INFINITY] = -np.inf
    return ids, logprobs
