"""Answers by an OpenAI-compatible server, which renders the dialogue in its model's own template."""

from __future__ import annotations

from collections.abc import Sequence

from fusechat.evaluate.answers import Reply, Request
from fusechat.evaluate.endpoint import Client, Endpoint


class ServerWriter:
    """A server that is asked one question at a call, `concurrency` at a time."""

    block = 1

    def __init__(self, endpoint: Endpoint) -> None:
        self.client = Client(endpoint=endpoint)
        self.client.check()
        self.concurrency = endpoint.concurrency

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        """Return a reply to every request, in order."""
        replies = []
        for one in requests:
            choice = self.client.chat(
                one.messages, temperature=one.temperature, max_tokens=one.max_tokens, seed=one.seed
            )
            text = str(choice["message"]["content"]).strip()
            replies.append(Reply(text=text, finish=str(choice.get("finish_reason"))))
        return replies
