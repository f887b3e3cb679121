"""What aligning one source takes."""

from __future__ import annotations

from collections.abc import Mapping

from fusechat.align.cells import EXTRA_ENTRIES
from fusechat.model_shape import ModelShape, count_parameters
from fusechat.plan.extraction import TOKEN_BYTES, store_bytes
from fusechat.plan.hardware import Hardware
from fusechat.plan.stage import StagePlan
from fusechat.plan.workload import Lengths
from fusechat.store import id_dtype

# One thread of a 2-core AMD EPYC (bench/results/align-cpu-2026-11-28.json): `bytes + ms` from store to store with
# vocabularies of 152k and 32k tokens, and warping at 506 tokens a dialogue.
ALIGN_TOKENS_PER_S = 1.0e6
ALIGN_FIXED_S = 7.1
WARP_TOKENS_PER_S = 1.74e6
# Bytes an entry of the pivot's and of a source's vocabulary: byte strings, maps, and the pivot's tokenizer, which
# spells what has no twin. While the source's is read its definition stands there too. Measured with those of Mistral,
# Qwen2, Llama-3 and GPT-2: a fifth less to a quarter more.
_HELD_BYTES = (1150, 350)
_READING_BYTES = (550, 1200)
_ROW_BYTES = 2 * (1 + 17) + 19  # of both models' views of a row, and what matches them
_BYTES_PER_TOKEN = 1.0  # of the whole data set: where its dialogues lie, and the shards' notes
_DIALOGUE_BYTES = 8 + 5 * 4 + 8  # index, five totals, an offset of the rows
_FINER_SHARE = 0.1  # rows whose prefix cells are stored, assumed


def plan_alignment(
    name: str,
    pivot: ModelShape,
    lengths: Lengths,
    source: ModelShape,
    top_k: int,
    shard_dialogues: int,
    rules: Mapping[str, str],
    hardware: Hardware,
    base_bytes: int,
) -> StagePlan:
    """Return what aligning a source's store by the five `rules` takes: it holds the two vocabularies, and both models'
    shards of `shard_dialogues` dialogues, one pair at a time.

    `lengths` are in the pivot's tokens: an AlignedStore has one row for each of the pivot's, of `top_k` entries.
    `base_bytes` are those of a process that aligns by such rules.
    """
    entry_bytes = id_dtype(pivot.vocab).itemsize + 2
    row_bytes: float = top_k * entry_bytes + 1 + 4
    dialogue_bytes, order_bytes = _DIALOGUE_BYTES, 0
    if rules["granularity"] == "cells":
        row_bytes += _FINER_SHARE * (top_k + EXTRA_ENTRIES) * (entry_bytes + 4 + 4)
        dialogue_bytes += 8  # an offset of the cells
        order_bytes = 4 * pivot.vocab
    store = int(lengths.rows * row_bytes + lengths.n_dialogues * dialogue_bytes) + order_bytes
    shard_share = min(1.0, shard_dialogues / lengths.n_dialogues)
    # Pages of both stores, their tokens unpacked, and the new rows, once in pieces and once joined.
    stores = sum(store_bytes(lengths, vocab, top_k) for vocab in (pivot.vocab, source.vocab))
    at_once = stores + 2 * TOKEN_BYTES * lengths.tokens + _ROW_BYTES * lengths.rows + 2 * store
    held, reading = (a * pivot.vocab + b * source.vocab for a, b in (_HELD_BYTES, _READING_BYTES))
    parts = {"vocabularies": held, "shard": int(shard_share * at_once)}
    if rules["granularity"] != "cells" and reading > sum(parts.values()):
        parts = {"vocabularies": reading}  # cells load numba after it, which takes more
    # Statistics want every path once before the rows do.
    warps = (rules["tokens"] == "dtw") * (1 + rules["vocab"].startswith("ms"))
    return StagePlan(
        stage="align",
        name=name,
        parameters=count_parameters(source),
        devices=0,
        host_parts={
            "process": base_bytes,
            **parts,
            "index": int(_BYTES_PER_TOKEN * lengths.tokens),
        },
        host_limit_bytes=hardware.host_memory_bytes,
        disk_parts={"aligned store": store},
        seconds=ALIGN_FIXED_S + lengths.tokens / ALIGN_TOKENS_PER_S + lengths.tokens * warps / WARP_TOKENS_PER_S,
    )
