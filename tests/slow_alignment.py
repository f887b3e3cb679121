"""Slow, obvious references of the alignment engine: which row serves which, and what becomes of its probability."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from aligned_rows import rows_of

from fusechat.align import RowKind
from fusechat.align.rows import Choices, Matches, RowView
from fusechat.align.vocabulary import VocabMap
from fusechat.bytetable import Role


def slow_match(pivot: RowView, source: RowView, partner: np.ndarray) -> list[tuple[int, int, int, int]]:
    """For every pivot row (kind, source row, chain, rest), by searching all source rows of its dialogue."""
    found = []
    for d, s in enumerate(partner.tolist()):
        source_rows = rows_of(source, s) if s >= 0 else []
        first = int(source.block.offsets["row"][s]) if s >= 0 else 0
        taken: set[int] = set()
        for row in rows_of(pivot, d):
            hit = next(
                (
                    i
                    for i, r in enumerate(source_rows)
                    if i not in taken and r["key"] == row["key"] and r["what"] == row["what"]
                ),
                None,
            )
            if hit is None:
                found.append((RowKind.NONE, -1, 0, 0))
                continue
            taken.add(hit)
            end = source_rows[hit]["end"]
            if row["what"] != "wide" or end >= row["end"]:
                kind = RowKind.COARSER if end > row["end"] and row["what"] == "wide" else RowKind.SAME
                found.append((kind, first + hit, 1, 0))
                continue
            last = hit
            while last < len(source_rows) and source_rows[last]["end"] < row["end"]:
                last += 1
            turn = row["key"][0]
            if last == len(source_rows) or source_rows[last]["key"][0] != turn:
                found.append((RowKind.NONE, -1, 0, 0))
                continue
            beyond = source_rows[last]["end"] > row["end"]
            rest = row["end"] - source_rows[last]["key"][1] if beyond else 0
            found.append((RowKind.FINER, first + hit, last - hit + 1, rest))
    return found


def as_tuples(m: Matches) -> list[tuple[int, int, int, int]]:
    return list(zip(m.kind.tolist(), m.source_row.tolist(), m.chain.tolist(), m.rest_bytes.tolist()))


def slow_remap(
    matches: Matches, pivot: RowView, source: RowView, index: Any, maps: VocabMap, choices: Choices
) -> tuple[list[dict[int, float]], list[float], np.ndarray, np.ndarray]:
    """Every row as {pivot id: probability}, the gold's log-probability, and the mass counted."""
    rows, golds = [], []
    mass, lost = np.zeros((4, 3)), np.zeros(len(source.table))
    ids, logprobs = source.block["row.ids"], source.block["row.logprobs"].astype(np.float64)
    source_golds = source.block["row.gold_logprob"].astype(np.float64)
    for r, kind in enumerate(matches.kind.tolist()):
        gold = int(pivot.gold[r])
        if kind == RowKind.NONE:
            rows.append({gold: 1.0} if choices.unaligned == "gold" else {})
            golds.append(math.nan)
            continue
        s, n, rest = (int(x[r]) for x in (matches.source_row, matches.chain, matches.rest_bytes))
        row: dict[int, float] = {}
        chain = 0.0
        if kind == RowKind.FINER:
            tail = pivot.table.token(gold)[len(pivot.table.token(gold)) - rest :]
            chain = sum(source_golds[s : s + n - (rest > 0)])
            if rest:
                last = s + n - 1
                p = math.exp(source_golds[last])
                for token, logprob in zip(ids[last].tolist(), logprobs[last]):
                    if token != source.gold[last] and source.table.token(token).startswith(tail):
                        p += math.exp(logprob)
                chain += math.log(p)
            chain = min(chain, 0.0)
            if choices.granularity != "first":
                rows.append({gold: 1.0 if choices.granularity == "gold" else math.exp(chain)})
                golds.append(chain)
                continue
        on_gold = math.exp(source_golds[s])
        for token, logprob in zip(ids[s].tolist(), logprobs[s]):
            if logprob == -math.inf:
                continue
            p = math.exp(logprob)
            shares = [
                (int(to), p * float(w))
                for to, w in zip(maps.target[index[r], token], maps.weight[index[r], token])
                if to >= 0
            ]
            if maps.target.shape[2] == 1:
                shares = [(to, p) for to, _ in shares]
            how = int(maps.quality[index[r], token])
            is_gold = kind != RowKind.FINER and token == source.gold[s]
            if is_gold or (pivot.at_end[r] and source.table.roles[token] in (Role.EOS, Role.TURN)):
                shares, how = [(gold, p)], 1
            if not shares:
                mass[kind, 0] += p
                lost[token] += p
                continue
            mass[kind, how] += p
            for to, share in shares:
                on_gold += share if to == gold and not is_gold else 0
                if to not in row or choices.collisions == "sum":
                    row[to] = row.get(to, 0.0) + share
        rows.append(row)
        golds.append(
            {RowKind.SAME: source_golds[s], RowKind.COARSER: min(math.log(on_gold), 0), RowKind.FINER: chain}[kind]
        )
    return rows, golds, mass, lost
