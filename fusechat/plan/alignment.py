"""What aligning one source takes."""

from __future__ import annotations

from fusechat.align.cells import EXTRA_ENTRIES
from fusechat.align.stage import PRESETS
from fusechat.config import AlignConfig
from fusechat.model_shape import ModelShape, count_parameters
from fusechat.plan.hardware import Hardware
from fusechat.plan.stage import StagePlan
from fusechat.plan.workload import Lengths
from fusechat.store import id_dtype

# One thread of a 2-core AMD EPYC (bench/results/align-cpu-2026-11-28.json): `bytes + ms` from store to store with
# vocabularies of 152k and 32k tokens, and warping at 506 tokens a dialogue.
ALIGN_TOKENS_PER_S = 1.0e6
ALIGN_FIXED_S = 7.1
WARP_TOKENS_PER_S = 1.74e6
_ALIGN_BYTES_PER_TOKEN = 17.0  # 9 to 16 MiB per further million tokens, of the whole data set
_ALIGN_TABLE_BYTES = 1200  # per entry of the two vocabularies: byte strings, maps, statistics
_DIALOGUE_BYTES = 8 + 5 * 4 + 8  # index, five totals, an offset of the rows
_FINER_SHARE = 0.1  # rows whose prefix cells are stored, assumed


def plan_alignment(
    name: str,
    pivot: ModelShape,
    lengths: Lengths,
    source: ModelShape,
    top_k: int,
    config: AlignConfig,
    hardware: Hardware,
    base_bytes: int,
) -> StagePlan:
    """Return what aligning a source's store takes: it streams shards and holds the two vocabularies.

    `lengths` are in the pivot's tokens: an AlignedStore has one row for each of the pivot's, of `top_k` entries.
    """
    chosen = config.model_copy(update=PRESETS.get(config.preset or "", {}))
    entry_bytes = id_dtype(pivot.vocab).itemsize + 2
    row_bytes: float = top_k * entry_bytes + 1 + 4
    dialogue_bytes, order_bytes = _DIALOGUE_BYTES, 0
    if chosen.granularity == "cells":
        row_bytes += _FINER_SHARE * (top_k + EXTRA_ENTRIES) * (entry_bytes + 4 + 4)
        dialogue_bytes += 8  # an offset of the cells
        order_bytes = 4 * pivot.vocab
    store = int(lengths.rows * row_bytes + lengths.n_dialogues * dialogue_bytes) + order_bytes
    # Statistics want every path once before the rows do.
    warps = (chosen.tokens == "dtw") * (1 + chosen.vocab.startswith("ms"))
    return StagePlan(
        stage="align",
        name=name,
        parameters=count_parameters(source),
        devices=0,
        host_parts={
            "process": base_bytes,
            "vocabularies": _ALIGN_TABLE_BYTES * (pivot.vocab + source.vocab),
            "shards": int(_ALIGN_BYTES_PER_TOKEN * lengths.tokens),
        },
        host_limit_bytes=hardware.host_memory_bytes,
        disk_parts={"aligned store": store},
        seconds=ALIGN_FIXED_S + lengths.tokens / ALIGN_TOKENS_PER_S + lengths.tokens * warps / WARP_TOKENS_PER_S,
    )
