"""Answers by transformers: batches of one temperature, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from transformers import GenerationConfig

from fusechat.bytetable import ByteTable
from fusechat.checkpoint import resolve_model
from fusechat.evaluate.answers import ERROR, TOO_LONG, Reply, Request
from fusechat.evaluate.prompts import end_tokens, prompt_ids, text_of
from fusechat.model import context_tokens, embedding_rows, load_model
from fusechat.template import load_template
from fusechat.tokenizer import load_tokenizer

_ANY_LENGTH = 1 << 30


class HfWriter:
    """A model loaded with transformers that answers `block` requests at a time."""

    concurrency = 1

    def __init__(self, model: str, *, template: str, block: int, dtype: str = "auto", device: str = "auto") -> None:
        directory = resolve_model(model)
        self.block = block
        self.tokenizer = load_tokenizer(directory)
        self.template = load_template(self.tokenizer, template)
        self.lm = load_model(directory, dtype=dtype, device=device)
        table = ByteTable.from_tokenizer(self.tokenizer, embedding_rows(self.lm))
        self.ends = end_tokens(self.tokenizer, table, self.lm.generation_config.eos_token_id)
        # A repetition penalty, min_p and the like of the model's own would act on what the benchmark asks for; a
        # configuration given to generate() does not help: transformers fills its gaps from this one.
        self.lm.generation_config = GenerationConfig()
        self.context = context_tokens(self.lm.config, _ANY_LENGTH)

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        """Return a reply to every request, in order."""
        prompts = [prompt_ids(self.template, self.tokenizer, request) for request in requests]
        replies: dict[int, Reply] = {}
        together: list[int] = []
        for n, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            room = self.context - len(prompt)
            if room < 1:
                replies[n] = Reply(text=ERROR, finish=TOO_LONG)
            elif room < request.max_tokens:  # the whole batch would be cut where this one ends
                replies[n] = self._generate([request], [prompt], room)[0]
            else:
                together.append(n)
        for _, group in groupby(together, key=lambda n: (requests[n].temperature, requests[n].max_tokens)):
            members = list(group)
            batch = [requests[n] for n in members]
            done = self._generate(batch, [prompts[n] for n in members], batch[0].max_tokens)
            replies |= zip(members, done, strict=True)
        return [replies[n] for n in range(len(requests))]

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request], prompts: Sequence[list[int]], max_new: int) -> list[Reply]:
        longest = max(map(len, prompts))
        input_ids = np.zeros((len(prompts), longest), np.int64)
        attention = np.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = prompt
            attention[row, longest - len(prompt) :] = 1
        temperature = requests[0].temperature
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {}
        torch.manual_seed(requests[0].seed)
        written = self.lm.generate(
            input_ids=torch.from_numpy(input_ids).to(self.lm.device),
            attention_mask=torch.from_numpy(attention).to(self.lm.device),
            max_new_tokens=max_new,
            eos_token_id=self.ends or None,
            pad_token_id=0,
            **({"do_sample": False} | sampling),
        )[:, longest:].tolist()
        replies = []
        for ids in written:
            stop = next((n for n, token in enumerate(ids) if token in self.ends), None)
            text = text_of(self.tokenizer, ids[:stop])
            replies.append(Reply(text=text, finish="length" if stop is None else "stop"))
        return replies
