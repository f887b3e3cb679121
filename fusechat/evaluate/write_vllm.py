"""Answers by vLLM in this process: it batches by itself, so a block is only how much a kill may cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusechat.bytetable import ByteTable
from fusechat.checkpoint import resolve_model
from fusechat.errors import FusechatError
from fusechat.evaluate.answers import ERROR, TOO_LONG, Reply, Request
from fusechat.evaluate.prompts import end_tokens, prompt_ids, text_of
from fusechat.template import load_template
from fusechat.tokenizer import load_tokenizer


class VllmWriter:
    """A vLLM engine that answers `block` requests at a call; prompts are sent as token ids of our own rendering."""

    concurrency = 1

    def __init__(self, model: str, *, template: str, block: int, dtype: str = "auto", **engine: Any) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise FusechatError(
                f"the backend vllm needs vLLM ({error}): pip install 'fusechat[vllm]', or use --backend hf"
            ) from error
        directory = resolve_model(model)
        self.block = block
        self.tokenizer = load_tokenizer(directory)
        self.template = load_template(self.tokenizer, template)
        self.llm = LLM(model=str(directory), dtype=dtype, **engine)
        self.context = int(self.llm.model_config.max_model_len)
        self.ends = end_tokens(self.tokenizer, ByteTable.from_tokenizer(self.tokenizer), None)

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        """Return a reply to every request, in order."""
        from vllm import SamplingParams

        prompts = [prompt_ids(self.template, self.tokenizer, request) for request in requests]
        fits = [n for n, prompt in enumerate(prompts) if len(prompt) < self.context]
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompts[n]} for n in fits],
            [
                SamplingParams(
                    temperature=requests[n].temperature,
                    max_tokens=min(requests[n].max_tokens, self.context - len(prompts[n])),
                    seed=requests[n].seed,
                    stop_token_ids=self.ends,
                    detokenize=False,
                )
                for n in fits
            ],
            use_tqdm=False,
        )
        replies = [Reply(text=ERROR, finish=TOO_LONG) for _ in requests]
        for n, output in zip(fits, outputs, strict=True):
            one = output.outputs[0]
            text = text_of(self.tokenizer, [token for token in one.token_ids if token not in self.ends])
            replies[n] = Reply(text=text, finish=str(one.finish_reason))
        return replies
