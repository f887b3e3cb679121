"""Random texts in two random tokenizations, as the rows of two stores."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np

from fusechat.align.rows import RowView
from fusechat.bytetable import ByteTable, Role
from fusechat.store import Block, make_block

END, SPACE = "<end>", "<dummy>"


class Side:
    """One model's view of dialogues: a vocabulary grown as texts are cut, and the columns of a TopKStore."""

    def __init__(self, rng: random.Random, k: int = 4) -> None:
        self.rng, self.k = rng, k
        self.pieces: dict[bytes, int] = {}
        self.tokens: list[bytes] = [b"<|im_end|>", b"<header>"]
        self.roles: list[int] = [Role.TURN, Role.OTHER]

    def piece(self, data: bytes) -> int:
        if data not in self.pieces:
            self.pieces[data] = len(self.tokens)
            self.tokens.append(data)
            self.roles.append(Role.TEXT)
        return self.pieces[data]

    def encode(self, texts: list[bytes], cut: float, dummy: bool, end: bool, lead: bytes = b"") -> dict[str, Any]:
        """Cut texts into tokens; `lead` is the template's white space that the first token of each carries."""
        ids, mask, turn, byte_end = [1], [False], [-1], [-1]

        def put(token: int, m: bool, t: int, e: int) -> None:
            ids.append(token), mask.append(m), turn.append(t), byte_end.append(e)

        for t, text in enumerate(texts):
            if dummy:
                put(self.piece(b" "), True, t, 0)
            bounds = [0, *(i for i in range(1, len(text)) if self.rng.random() < cut), len(text)] if text else [0]
            for a, b in itertools.pairwise(bounds):
                put(self.piece(lead * (a == 0) + text[a:b]), True, t, b)
            if end:
                put(0, True, t, len(text))
            put(1, False, -1, -1)
        return {
            "token.input_ids": np.array(ids, np.int32),
            "token.loss_mask": np.array(mask),
            "token.turn": np.array(turn, np.int32),
            "token.byte_end": np.array(byte_end, np.int32),
        }

    def block(self, records: list[dict[str, Any]], dtype: Any = np.uint16) -> tuple[Block, ByteTable]:
        """Give the records random top-k rows that hold the gold token most of the time."""
        for index, record in enumerate(records):
            gold = record["token.input_ids"][1:][record["token.loss_mask"][1:]]
            ids = np.zeros((len(gold), self.k), dtype)
            logprobs = np.full((len(gold), self.k), -np.inf, np.float16)
            gold_logprob = np.zeros(len(gold), np.float32)
            for r, g in enumerate(gold.tolist()):
                chosen = self.rng.sample(range(len(self.tokens)), min(self.k, len(self.tokens)))
                if self.rng.random() < 0.8 and g not in chosen:
                    chosen[self.rng.randrange(len(chosen))] = g
                weights = np.array(sorted((self.rng.random() ** 4 + 1e-4 for _ in chosen), reverse=True))
                p = weights / weights.sum() * self.rng.uniform(0.5, 1)
                ids[r, : len(chosen)], logprobs[r, : len(chosen)] = chosen, np.log(p)
                gold_logprob[r] = logprobs[r, chosen.index(g)] if g in chosen else math.log(1e-5)
            record |= {
                "dialogue.index": np.array([index], np.int64),
                "row.ids": ids,
                "row.logprobs": logprobs,
                "row.gold_logprob": gold_logprob,
            }
        return make_block(records), ByteTable.from_tokens(self.tokens, self.roles)


def views(seed: int, k: int = 4) -> tuple[RowView, RowView, np.ndarray]:
    """Random dialogues over a tiny alphabet in two random tokenizations, some missing on the source's side."""
    rng = random.Random(seed)
    pivot, source = Side(rng, k), Side(rng, k)
    pivot_records, source_records, partner = [], [], []
    for _ in range(rng.randint(1, 4)):
        texts = [bytes(rng.choices(b"ab \xc3", k=rng.choice([0, 1, 2, 7, 30]))) for _ in range(rng.randint(1, 3))]
        ends, dummies = [rng.random() < 0.8 for _ in "ps"], [rng.random() < 0.3 for _ in "ps"]
        pivot_records.append(pivot.encode(texts, rng.random(), dummies[0], ends[0]))
        if rng.random() < 0.85:
            partner.append(len(source_records))
            cut = texts[: rng.randint(1, len(texts))] if rng.random() < 0.2 else texts
            record = source.encode(cut, rng.random(), dummies[1], ends[1])
            if rng.random() < 0.2:  # broken off inside a turn
                stop = rng.randint(1, len(record["token.turn"]))
                record = {key: values[:stop] for key, values in record.items()}
            source_records.append(record)
        else:
            partner.append(-1)
    if not source_records:
        source_records.append(source.encode([b"a"], 0.5, False, True))
    pivot_block, pivot_table = pivot.block(pivot_records)
    source_block, source_table = source.block(source_records, np.int32 if rng.random() < 0.5 else np.uint16)
    return (
        RowView.of(pivot_block, pivot_table),
        RowView.of(source_block, source_table),
        np.array(partner, np.int64),
    )


def rows_of(view: RowView, dialogue: int) -> list[dict[str, Any]]:
    """A dialogue's rows, read off its token columns one by one."""
    record = view.block.at(dialogue)
    ids, turn, end = record["token.input_ids"], record["token.turn"], record["token.byte_end"]
    rows = []
    for t in range(len(ids) - 1):
        if not record["token.loss_mask"][t + 1]:
            continue
        start = int(end[t]) if turn[t] == turn[t + 1] else 0
        role = view.table.roles[ids[t + 1]]
        what = "wide" if end[t + 1] > start else "zero" if role == Role.TEXT else "end"
        rows.append({"key": (int(turn[t + 1]), start), "end": int(end[t + 1]), "what": what})
    return rows
