"""Chat completions from any OpenAI-compatible server: concurrent, rate-limited, retried with back-off.

Errors are of two kinds. An EndpointError stops everything: the server is down, wants another key, or knows no such
model. A ReplyError concerns one request; the others go on, up to a limit beyond which something is plainly wrong.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from fusechat.artifact import Json
from fusechat.errors import ConfigError, FusechatError
from fusechat.http_reply import reply_text

_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT_S = 120
_CONNECT_S = 10
TOLERATED_FAILURES = 10

T = TypeVar("T")


class EndpointError(FusechatError):
    """The server as a whole cannot be worked with."""


class ReplyError(FusechatError):
    """The server's reply to one request cannot be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """An OpenAI-compatible server and the model to ask there.

    `url` is the API's root, such as http://localhost:8000/v1; `api_key` the key itself, `api_key_name` where it was
    read from, for messages. A request is tried `retries` times more, waiting `backoff_s` · 2ⁿ seconds or as long as the
    server asks (Retry-After). `fields` go into every request's body over what the caller sends, null takes one away:
    max_completion_tokens in the place of max_tokens, say.
    """

    url: str
    model: str
    api_key: str | None = None
    api_key_name: str = "OPENAI_API_KEY"
    concurrency: int = 8
    requests_per_minute: float | None = None
    timeout_s: float = 300.0
    retries: int = 5
    backoff_s: float = 1.0
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"{self.url} is no URL of an API: give one such as http://localhost:8000/v1")


@dataclass(kw_only=True)
class Client:
    """An endpoint with its connections; safe to share between threads."""

    endpoint: Endpoint
    session: requests.Session = field(init=False)
    _turn: threading.Lock = field(init=False, default_factory=threading.Lock)
    _next_start_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        one = self.endpoint
        retry = Retry(
            total=one.retries,
            read=min(1, one.retries),  # what was too slow once is paid for, and mostly too slow again
            backoff_factor=one.backoff_s,
            backoff_max=_LONGEST_WAIT_S,
            backoff_jitter=one.backoff_s / 2,
            retry_after_max=_LONGEST_WAIT_S,
            status_forcelist=_TRY_AGAIN,
            allowed_methods=None,
            raise_on_status=False,
        )
        self.session = requests.Session()
        adapter = HTTPAdapter(max_retries=retry, pool_maxsize=one.concurrency)
        self.session.mount("http://", adapter)
        self.session.mount("https://", adapter)
        if one.api_key:
            self.session.headers["Authorization"] = f"Bearer {one.api_key}"

    def check(self) -> None:
        """Ask once, without retries, whether the server is there and takes the key; raises EndpointError."""
        try:
            reply = requests.get(
                f"{self.endpoint.url.rstrip('/')}/models", headers=dict(self.session.headers), timeout=_CONNECT_S
            )
        except requests.ReadTimeout:
            return  # slow is not down; the requests themselves have a longer patience
        except requests.RequestException as error:
            raise self._down(error) from error
        if reply.status_code in (401, 403):
            raise self._refused(reply)

    def chat(self, messages: Sequence[Json], **sampling: Any) -> Json:
        """Return the first choice of a chat completion; raises EndpointError or ReplyError."""
        self._wait_for_turn()
        body = {"model": self.endpoint.model, "messages": list(messages), **sampling, **self.endpoint.fields}
        try:
            reply = self.session.post(
                f"{self.endpoint.url.rstrip('/')}/chat/completions",
                json={key: value for key, value in body.items() if value is not None},
                timeout=(_CONNECT_S, self.endpoint.timeout_s),
            )
        except requests.RequestException as error:
            raise self._down(error) from error
        if reply.status_code in (401, 403):
            raise self._refused(reply)
        if reply.status_code == 404:
            raise EndpointError(
                f"{self.endpoint.url} knows no model {self.endpoint.model}, or is not the API's root "
                f"(it mostly ends in /v1): HTTP 404, {self._shown(reply)}"
            )
        if reply.status_code == 429:
            raise EndpointError(
                f"{self.endpoint.url} still limits the rate after {self.endpoint.retries + 1} tries: lower the "
                f"concurrency or the requests per minute and run again; {self._shown(reply)}"
            )
        if reply.status_code != 200:
            raise ReplyError(f"HTTP {reply.status_code} from {self.endpoint.url}: {self._shown(reply)}")
        return self._choice(reply)

    def _choice(self, reply: requests.Response) -> Json:
        try:
            choice = reply.json()["choices"][0]
            if not isinstance(choice["message"]["content"], str):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ReplyError(
                f"{self.endpoint.url} answers no chat completion (is it the API's root?): {self._shown(reply)}"
            ) from error
        return dict(choice)

    def _wait_for_turn(self) -> None:
        if self.endpoint.requests_per_minute is None:
            return
        with self._turn:
            start_s = max(self._next_start_s, time.monotonic())
            self._next_start_s = start_s + 60.0 / self.endpoint.requests_per_minute
        time.sleep(max(0.0, start_s - time.monotonic()))

    def _shown(self, reply: requests.Response) -> str:
        return reply_text(reply, self.endpoint.api_key)

    def _refused(self, reply: requests.Response) -> EndpointError:
        one, why = self.endpoint, f"HTTP {reply.status_code}, {self._shown(reply)}"
        if one.api_key:
            return EndpointError(
                f"{one.url} refuses the API key in {one.api_key_name} ({why}): correct it and run again"
            )
        return EndpointError(f"{one.url} wants an API key ({why}): set the environment variable {one.api_key_name}")

    def _down(self, error: requests.RequestException) -> EndpointError:
        slow = isinstance(error, requests.Timeout) or "Read timed out" in str(error)
        what = (
            f"gives no answer within {self.endpoint.timeout_s:g} s"
            if slow
            else f"cannot be reached ({type(error).__name__})"
        )
        mend = "raise the timeout or lower the concurrency" if slow else "start it, or correct the URL"
        return EndpointError(f"{self.endpoint.url} {what}: {mend}, and run the same command again")


def for_each(
    items: Sequence[T],
    work: Callable[[T], None],
    *,
    concurrency: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Do `work` on every item, several at a time, and return the messages of those that failed with a ReplyError.

    Any other error, and too many ReplyErrors, stop the rest and are raised when the work under way has ended, so that
    what was already asked for is kept.
    """
    stop, lock = threading.Event(), threading.Lock()
    failures: list[str] = []

    # Failures are counted and the rest is stopped here: other threads would ask for more before the main one heard.
    def one(item: T) -> None:
        if stop.is_set():
            return
        try:
            work(item)
        except ReplyError as error:
            with lock:
                failures.append(str(error))
            if len(failures) > TOLERATED_FAILURES:
                stop.set()
                raise EndpointError(
                    f"{len(failures)} requests failed, the last with: {error}; replies had so far are kept"
                ) from error
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(max_workers=concurrency) as pool:
        futures = [pool.submit(one, item) for item in items]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                if progress is not None:
                    progress(done, len(items))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return failures
