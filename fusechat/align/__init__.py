"""Alignment: every source's rows at the pivot's positions and in the pivot's vocabulary.

A pivot row is served by the source row that has the same bytes of the same message before it. `row.kind` says what the
two next tokens have in common, and so what the row may teach (fusechat.align.RowKind):

    SAME      both end at the same byte      candidates through the vocabulary map
    COARSER   the source's ends later        candidates through their first piece; the source's gold on the pivot's
    FINER     the source's ends earlier      the pivot's gold token alone, with the source's probability of its bytes
    NONE      no common boundary             one-hot on the pivot's gold (`unaligned: gold`), else no entry at all

Columns of an AlignedStore, beside its offsets:

    dialogue.index          int64    place in the dataset
    dialogue.source_nll     float32  the source's own negative log-likelihood in nats, over the turns both models
                                     encoded; NaN where the source skipped the dialogue
    dialogue.pivot_nll      float32  the pivot's, over the same turns
    dialogue.source_tokens  int32    rows of each in those sums
    dialogue.pivot_tokens   int32
    dialogue.content_bytes  int32    bytes of content of those turns
    row.ids, row.logprobs   [R,K]    as in a TopKStore, pivot ids; most probable first
    row.kind                uint8    RowKind
    row.gold_logprob        float32  the source's log-probability of the pivot's gold token: exact on SAME rows, along
                                     the source's tokens on FINER rows, what was mapped to it on COARSER rows, NaN on
                                     NONE rows

With `granularity: cells` a store holds more for its FINER rows (and the chain in `row.*` as ever), so that their
whole row is taught: ranges of the vocabulary in the order of its bytes, kept once in byte_order.safetensors. The cell
axis has one row for every FINER row, in their order; offset.cell int64[n+1] says which are a dialogue's
(fusechat.align.cells):

    cell.ids, cell.logprobs [F,K+2]  the pivot's next token first, then the source's candidates, masses that add up to
                                     at most 1; the rest is all other tokens'
    cell.low, cell.high     int32    high > low: the entry is byte_order[low:high] without the smaller ranges and the
                                     single ids of its row; else it is the single id
"""

from __future__ import annotations

from fusechat.align.paper import distribute
from fusechat.align.rows import RowKind
from fusechat.align.stage import align, read_byte_order, read_coverage
from fusechat.align.timewarp import dtw
from fusechat.align.vocabulary import vocab_map
from fusechat.callable_module import make_callable

__all__ = ["RowKind", "align", "distribute", "dtw", "read_byte_order", "read_coverage", "vocab_map"]
make_callable(__name__)
