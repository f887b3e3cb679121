"""Training examples: the pivot's tokens, and for every row the distribution that is to be taught there.

On dialogues that the pivot predicts better than any source, the paper teaches the pivot its own distribution, which
holds the target back where training moves it far (docs/quality.md); the default is to leave them to their labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fusechat.errors import ConfigError, MismatchError
from fusechat.loss import IGNORE_LABEL
from fusechat.store import Store, row_positions
from fusechat.train.matched import MatchedSource
from fusechat.train.select import PIVOT, Selection, dialogue_weights, first_best, row_weights
from fusechat.train.source import Record, Source
from fusechat.train.targets import Array, Targets, mixed, picked

# Which rows stand where (several may share one), their targets, and the columns of their Example.
Found = tuple[Array | slice, Targets, dict[str, Array]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One dialogue.

    input_ids int64[T]; labels int64[T], −100 where not the assistant's; rows int64[R], the positions that predict an
    assistant token, and their targets; taught float32[R], the share of the soft term that the targets have (the rest is
    the label's); row_weight float32[R], which adds up to one where several rows share a position; origin int64[R], the
    candidate that weighs most, 0 for the pivot.
    """

    dialogue: int
    input_ids: Array
    labels: Array
    rows: Array
    targets: Targets
    taught: Array
    row_weight: Array
    origin: Array
    chunk: Array | None = None
    """Objective alm: int64[R], the chunk of each row, −1 for none."""
    chunk_logprob: Array | None = None
    """Objective alm: float32[C], the source's log-probability of each chunk."""


class FusionDataset:
    """Examples from a pivot's TopKStore and the stores of its sources; without a source, the SFT control."""

    def __init__(
        self,
        pivot: Store,
        sources: Sequence[Source] = (),
        *,
        select: Selection | None = None,
        when_pivot_wins: Literal["labels", "pivot"] = "labels",
        renormalise: bool = False,
        matched: Sequence[MatchedSource] = (),
        limit: int | None = None,
    ) -> None:
        self.pivot = pivot
        self.sources = list(sources)
        self.select = select = select or Selection()
        self.when_pivot_wins = when_pivot_wins if self.sources else "labels"  # the control learns nothing else
        self.renormalise = renormalise
        self.matched = list(matched)
        self.indices = sorted(pivot)[:limit]
        self.byte_order = _common_byte_order(self.sources)
        unknown = set(select.weights) - {"pivot", *(s.name for s in self.sources)}
        if self.sources and unknown:
            raise ConfigError(f"source_weights names {', '.join(sorted(unknown))}, which is no source of this target")
        totals = [source.totals() for source in self.sources]
        self.weights = dialogue_weights(self.sources, totals, self.indices, select)
        self.have = np.array([[i in known for i in self.indices] for known in totals], dtype=np.bool_)
        self.have = self.have.reshape(len(self.sources), len(self.indices))

    @property
    def source_share(self) -> float:
        """Share of dialogues, by weight, whose taught distribution is a source's."""
        return float(1.0 - self.weights[PIVOT].mean()) if len(self.indices) else 0.0

    def lengths(self) -> list[int]:
        """Return the number of tokens of every dialogue."""
        return [self.pivot.n_tokens(dialogue) for dialogue in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Example:
        dialogue = self.indices[position]
        record = self.pivot[dialogue]
        mask = record["token.loss_mask"]
        input_ids = record["token.input_ids"].astype(np.int64)
        labels = np.where(mask, input_ids, IGNORE_LABEL)
        labels[:1] = IGNORE_LABEL  # nothing predicts a dialogue's first token
        rows = row_positions(mask)
        found = self._matched if self.matched else self._candidates
        place, targets, columns = found(position, record, len(rows))
        return Example(
            dialogue=dialogue, input_ids=input_ids, labels=labels, rows=rows[place], targets=targets, **columns
        )

    def _candidates(self, position: int, pivot: Record, n_rows: int) -> Found:
        """Return the rows' targets, and which of them stand where."""
        have = self.have[:, position]
        records = [s.read(self.indices[position]) if known else None for s, known in zip(self.sources, have)]
        if self.select.unit == "sequence" or not have.any():
            weights = self.weights[:, position, None]
        else:
            gold = np.full((1 + len(records), n_rows), np.nan, np.float32)
            gold[PIVOT] = pivot["row.gold_logprob"]
            for c, record in enumerate(records, 1):
                if record is not None:
                    gold[c] = record["row.gold_logprob"]
            weights = row_weights(self.sources, gold, pivot, self.select)
        origin = np.broadcast_to(first_best(weights), n_rows)
        named, candidates = [], []
        for c in np.flatnonzero(weights.max(axis=1, initial=0.0)).tolist():
            if c == PIVOT:
                if self.when_pivot_wins == "labels":
                    continue
                candidates.append(Targets.by(pivot["row.ids"], pivot["row.logprobs"]))
            else:
                record = records[c - 1]
                assert record is not None  # a source that lacks the dialogue has no weight in it
                candidates.append(self.sources[c - 1].targets(record, pivot))
            named.append(c)
        if not named:
            return slice(None), Targets.nothing(n_rows), _columns(np.zeros(n_rows), np.ones(n_rows), origin)
        if weights.max(axis=0).min(initial=1.0) == 1:  # one has all of every row
            targets = picked(candidates, np.broadcast_to(first_best(weights[named]), n_rows))
            targets = targets.without(np.broadcast_to(weights[named].max(axis=0) == 0, n_rows))
            return slice(None), targets, _columns(targets.present(), np.ones(n_rows), origin)
        return self._mixed(candidates, np.broadcast_to(weights[named], (len(named), n_rows)), origin)

    def _mixed(self, candidates: Sequence[Targets], weights: Array, origin: Array) -> Found:
        """Mix candidates that are distributions over tokens; those that partition the vocabulary get their own rows.

        The cross-entropy with a mixture is the mixture of the cross-entropies, so that nothing changes by the split.
        Those that are mixed share one tail: with `missing: tail`, mass outside one's tokens may lie on another's.
        """
        present = np.stack([t.present() for t in candidates])
        weights = weights * present
        share = weights.sum(axis=0)
        cells = np.stack([t.partition for t in candidates]) & (weights > 0)
        plain = np.where(cells, np.float32(0.0), weights)
        plain_share = plain.sum(axis=0)
        own_rows = [np.flatnonzero(row) for row in cells]
        targets = mixed(
            candidates,
            plain / np.where(plain_share > 0, plain_share, np.float32(1.0)),
            renormalise=self.renormalise,
            beside=[t.taken(rows) for t, rows in zip(candidates, own_rows) if len(rows)],
        )
        place = np.concatenate([np.arange(len(share)), *own_rows])
        part = np.concatenate([np.where(share > 0, plain_share, np.float32(1.0)), *map(np.take, weights, own_rows)])
        if not part.all():  # where all of a row is cells, there is no mixture
            kept = np.flatnonzero(part)
            place, part, targets = place[kept], part[kept], targets.taken(kept)
        share = share[place]
        return place, targets, _columns(share, part / np.where(share > 0, share, np.float32(1.0)), origin[place])

    def _matched(self, position: int, pivot: Record, n_rows: int) -> Found:
        """Return what an objective without a vocabulary map needs of the dialogue's best source."""
        best = int(self.weights[:, position].argmax())
        origin = np.full(n_rows, best)
        if best == PIVOT:
            columns = _columns(np.zeros(n_rows), np.ones(n_rows), origin)
            columns |= {"chunk": np.full(n_rows, -1, np.int64), "chunk_logprob": np.zeros(0, np.float32)}
            return slice(None), Targets.nothing(n_rows), columns
        found = self.matched[best - 1].at(self.indices[position])
        taught = found.targets.present() if found.targets.width else found.chunk >= 0
        columns = _columns(taught, np.ones(n_rows), origin)
        return slice(None), found.targets, columns | {"chunk": found.chunk, "chunk_logprob": found.chunk_logprob}


def _columns(taught: Array, row_weight: Array, origin: Array) -> dict[str, Array]:
    return {
        "taught": np.asarray(taught).astype(np.float32),
        "row_weight": row_weight.astype(np.float32),
        "origin": origin.astype(np.int64),
    }


def _common_byte_order(sources: Sequence[Source]) -> npt.NDArray[np.int32] | None:
    orders = [s.byte_order for s in sources if s.byte_order is not None]
    if any(not np.array_equal(order, orders[0]) for order in orders):
        raise MismatchError("two sources were aligned to pivots of different vocabularies: align them again")
    return orders[0] if orders else None
