"""The TopKStore: bytes a row, random reads, writes.

    python bench/store.py [--size small] [--json OUT] [--check]

What is written is read back and compared first. K = 10, V = 32,000, dialogues as bench/extract_model.py makes them; the
gold token is among the K in a share of the rows, since what is stored depends on it. The ids are random, which costs as
much as any others: nothing is compressed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fusechat.artifact import ShardedWriter
from fusechat.bench.claims import Claim, at_least, at_most
from fusechat.bench.extract_model import VOCAB_SIZE, sequence, sequences
from fusechat.bench.report import parser, report
from fusechat.bench.timing import interleave, spread
from fusechat.store import TOPK_FORMAT, TOPK_VERSION, Store, id_dtype, make_block, open_topk, row_positions, write_block

K = 10
ROWS = 512
N_LONG = 256
SHARD_DIALOGUES = 512
# How often the token that stands there is one of the ten likeliest: two small models have 0.90 and 0.96 on their own
# text (docs/extraction.md), and less makes a larger store.
GOLD_SHARE = 0.85


def record(index: int, encoded: Any, rng: np.random.Generator, gold_share: float) -> dict[str, Any]:
    """Return a dialogue's columns with random rows, the gold token in its place among their ids."""
    positions = row_positions(encoded.loss_mask)
    rows = len(positions)
    logprobs = -np.sort(rng.exponential(3.0, (rows, K)), axis=1).astype(np.float32)
    ids = rng.integers(0, VOCAB_SIZE, (rows, K)).astype(id_dtype(VOCAB_SIZE))
    gold_logprob = np.full(rows, -12.5, dtype=np.float32)
    among = np.flatnonzero(rng.random(rows) < gold_share)
    place = np.minimum(rng.geometric(0.6, len(among)) - 1, K - 1)
    ids[among, place] = encoded.input_ids[positions[among] + 1]
    gold_logprob[among] = logprobs[among, place]
    return {
        "dialogue.index": np.array([index], dtype=np.int64),
        "token.input_ids": encoded.input_ids,
        "token.loss_mask": encoded.loss_mask,
        "token.turn": encoded.turn,
        "token.byte_end": encoded.byte_end,
        "row.ids": ids,
        "row.logprobs": logprobs.astype(np.float16),
        "row.gold_logprob": gold_logprob,
    }


def write(out: Path, records: list[dict[str, Any]]) -> None:
    """Write a store, checksums and all."""
    writer = ShardedWriter(out, {"format": TOPK_FORMAT, "version": TOPK_VERSION})
    for number, begin in enumerate(range(0, len(records), SHARD_DIALOGUES)):
        block = make_block(records[begin : begin + SHARD_DIALOGUES])
        writer.add(f"shard-{number:05d}.safetensors", lambda path, block=block: write_block(path, block))
    writer.finish()


def claims(folder: Path, *, count: int, rounds: int) -> list[Claim]:
    """Measure size, write and read of one store, and the size of one whose gold tokens are never among the K."""
    rng = np.random.default_rng(1)
    records = _records(count, rng, GOLD_SHARE)
    n_rows = sum(len(r["row.ids"]) for r in records)
    seconds = []
    for i in range(rounds):
        start = time.perf_counter()
        write(folder / f"s{i}", records)
        seconds.append(time.perf_counter() - start)
    store = open_topk(folder / "s0")
    _check_equal(store, records)
    n_tokens = sum(len(r["token.input_ids"]) for r in records)
    order = (count + rng.permutation(N_LONG)).tolist()

    def read() -> None:
        for dialogue in order:
            part = store[dialogue]
            np.array(part["row.ids"])
            np.array(part["row.logprobs"])

    def read_whole() -> None:
        for dialogue in order:
            dict(store[dialogue])

    timed = interleave({"rows": read, "all": read_whole}, 9)
    read_us, whole_us = (spread([s / len(order) * 1e6 for s in timed[name].of("cpu")]) for name in ("rows", "all"))
    never = _records(count, rng, 0.0)
    write(folder / "never", never)
    _check_equal(open_topk(folder / "never"), never)
    size, size_never = _row_bytes(folder / "s0", records), _row_bytes(folder / "never", never)
    note = f"{n_tokens / n_rows:.2f} tokens a row, gold among the K in {GOLD_SHARE:.0%}; all files counted"
    return [
        at_most("store, size, K = 10, V ≤ 65,536", "absolute", size, 46.0, "B/row", note=note),
        at_most("store, size, no gold token among the K", "absolute", size_never, None, "B/row"),
        at_most("store, random read of 512 rows, warm", "absolute", read_us, 20.0, "µs"),
        at_most("store, random read of all columns of 512 rows", "absolute", whole_us, None, "µs"),
        at_least("store, write", "absolute", spread([n_rows / s / 1e3 for s in seconds]), 500.0, "k rows/s"),
    ]


def _records(count: int, rng: np.random.Generator, gold_share: float) -> list[dict[str, Any]]:
    """Return dialogues of mixed lengths, and behind them those of 512 rows that are read."""
    records = [record(i, encoded, rng, gold_share) for i, encoded in enumerate(sequences(count))]
    long = sequence(ROWS * 4 // 3 + 1, rng)
    return records + [record(count + i, long, rng, gold_share) for i in range(N_LONG)]


def _row_bytes(directory: Path, records: list[dict[str, Any]]) -> float:
    return sum(path.stat().st_size for path in directory.iterdir()) / sum(len(r["row.ids"]) for r in records)


def _check_equal(store: Store, records: list[dict[str, Any]]) -> None:
    for written in records[::7]:
        found = store[int(written["dialogue.index"][0])]
        for key, values in written.items():
            np.testing.assert_array_equal(found[key], values)


def main() -> int:
    """Measure everything and report."""
    chosen = parser(__doc__ or "").parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    quick = chosen.size == "small"
    with tempfile.TemporaryDirectory() as folder:
        found = claims(Path(folder), count=300 if quick else 2000, rounds=3 if quick else 5)
    return report("store", found, chosen, disk=True)


if __name__ == "__main__":
    sys.exit(main())
