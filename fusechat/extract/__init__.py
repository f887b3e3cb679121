"""Extraction: one model's top-k next-token log-probabilities over a dialogue set, as a TopKStore.

One row per position that predicts an assistant token; log-probabilities are of the full softmax at temperature 1, so
that the mass outside the top k stays known. Token ids are stored, never text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusechat.artifact import Json, ShardedWriter
from fusechat.bytetable import ByteTable
from fusechat.callable_module import make_callable
from fusechat.checkpoint import checkpoint_sha256, resolve_model
from fusechat.dialogue import dataset_fingerprint
from fusechat.encode import encode_all
from fusechat.errors import DataError
from fusechat.extract.hf import RowScores, score_rows
from fusechat.model import check_head, context_tokens, embedding_rows, load_model
from fusechat.records import Dialogue, Encoded
from fusechat.store import TOPK_FORMAT, id_dtype, make_block, write_block
from fusechat.template import load_template
from fusechat.tokenizer import load_tokenizer

__all__ = ["extract"]
make_callable(__name__)

Progress = Callable[[int, int], None]


def extract(
    model: str,
    dialogues: Sequence[Dialogue],
    out: Path,
    *,
    top_k: int = 10,
    template: str = "own",
    max_length_tokens: int = 2048,
    dtype: str = "auto",
    device: str = "auto",
    batch_tokens: int = 8192,
    shard_dialogues: int = 512,
    progress: Progress | None = None,
) -> Json:
    """Write a model's TopKStore and return its manifest; resumes at the first missing shard.

    `template` is `own` or a path to the tokenizer directory or .jinja file whose template renders the dialogues.
    `progress(done_tokens, all_tokens)` is called after every batch. Raises DataError for a model, tokenizer or template
    that does not fit and for NaN in the logits, MismatchError when `out` was made from other inputs.
    """
    directory = resolve_model(model)
    tokenizer = load_tokenizer(directory)
    lm = load_model(directory, dtype=dtype, device=device)
    vocab_size = embedding_rows(lm)
    if top_k > vocab_size:
        raise DataError(f"top_k {top_k} is more than the {vocab_size} tokens of {model}: ask for fewer")
    table = ByteTable.from_tokenizer(tokenizer, vocab_size)
    chat_template = load_template(tokenizer, template)
    length_tokens = context_tokens(lm.config, max_length_tokens)
    request = {
        "format": TOPK_FORMAT,
        "version": 1,
        "model_sha256": checkpoint_sha256(directory),
        "tokenizer_sha256": table.sha256,
        "template_sha256": chat_template.sha256,
        "dataset_fingerprint": dataset_fingerprint(dialogues),
        "n_dialogues": len(dialogues),
        "vocab_size": vocab_size,
        "top_k": top_k,
        "max_length_tokens": length_tokens,
        "backend": "hf",
        "dtype": str(lm.dtype).removeprefix("torch."),
        "id_dtype": id_dtype(vocab_size).name,
        "logprob_dtype": "float16",
        "shard_dialogues": shard_dialogues,
    }
    writer = ShardedWriter(out, request)
    if writer.complete:
        from fusechat.store import open_topk

        return open_topk(out).manifest
    encodings = encode_all(dialogues, tokenizer, table, template=chat_template, max_length_tokens=length_tokens)
    check_head(lm, encodings.encoded[0].input_ids)
    all_tokens = sum(len(e.input_ids) for e in encodings.encoded)
    done_tokens = 0

    def advance(tokens: int) -> None:
        nonlocal done_tokens
        done_tokens += tokens
        if progress is not None:
            progress(done_tokens, all_tokens)

    for begin in range(0, len(encodings.encoded), shard_dialogues):
        indices = encodings.index[begin : begin + shard_dialogues]
        members = encodings.encoded[begin : begin + shard_dialogues]
        name = f"shard-{begin // shard_dialogues:05d}.safetensors"
        if name in writer.done:
            advance(sum(len(e.input_ids) for e in members))
            continue
        scores = score_rows(lm, members, top_k=top_k, batch_tokens=batch_tokens, advance=advance)
        for index, score in zip(indices, scores):
            if not np.isfinite(score.gold_logprob).all():
                raise DataError(
                    f"{model} gives NaN or infinite logits on dialogue {index}: the model or its dtype is broken"
                )
        block = make_block(
            _record(index, encoded, score, vocab_size) for index, encoded, score in zip(indices, members, scores)
        )
        writer.add(
            name,
            lambda path, block=block: write_block(path, block),
            n_dialogues=len(members),
            n_rows=len(block["row.ids"]),
            n_tokens=len(block["token.input_ids"]),
        )
    return writer.finish(
        model=str(directory.resolve()),
        template=template,
        skipped={str(dialogue): reason for dialogue, reason in encodings.skipped.items()},
        cut_turns={str(dialogue): turns for dialogue, turns in encodings.cut_turns.items()},
    )


def _record(index: int, encoded: Encoded, score: RowScores, vocab_size: int) -> dict[str, Any]:
    return {
        "dialogue.index": np.array([index], dtype=np.int64),
        "token.input_ids": encoded.input_ids,
        "token.loss_mask": encoded.loss_mask,
        "token.turn": encoded.turn,
        "token.byte_end": encoded.byte_end,
        "row.ids": score.ids.astype(id_dtype(vocab_size)),
        "row.logprobs": score.logprobs.astype(np.float16),
        "row.gold_logprob": score.gold_logprob,
    }
