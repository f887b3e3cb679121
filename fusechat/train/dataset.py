"""Training examples: the pivot's tokens, and for every row the distribution that is to be taught there.

On dialogues that the pivot predicts better than any source, the paper teaches the pivot its own distribution, which
holds the target back where training moves it far (docs/quality.md); the default is to leave them to their labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from fusechat.errors import ConfigError, MismatchError
from fusechat.loss.choice import mix_candidates
from fusechat.store import Store, row_positions
from fusechat.train.matched import MatchedSource
from fusechat.train.select import PIVOT, Selection, dialogue_weights, row_weights
from fusechat.train.source import Source
from fusechat.train.targets import Array, Targets


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
        self.when_pivot_wins = when_pivot_wins
        self.renormalise = renormalise
        self.matched = list(matched)
        self.indices = sorted(pivot)[:limit]
        self.byte_order = _common_byte_order(self.sources)
        unknown = set(select.weights) - {"pivot", *(s.name for s in self.sources)}
        if self.sources and unknown:
            raise ConfigError(f"source_weights names {', '.join(sorted(unknown))}, which is no source of this target")
        totals = [source.totals() for source in self.sources]
        self.weights = dialogue_weights(self.sources, totals, self.indices, select)
        self.have = np.array([[i in known for known in totals] for i in self.indices], dtype=np.bool_)

    @property
    def source_share(self) -> float:
        """Share of dialogues, by weight, whose taught distribution is a source's."""
        return float(1.0 - self.weights[:, PIVOT].mean()) if len(self.indices) else 0.0

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
        labels = np.where(mask, input_ids, -100)
        labels[:1] = -100  # nothing predicts a dialogue's first token
        rows = row_positions(mask)
        weights = np.broadcast_to(self.weights[position], (len(rows), 1 + len(self.sources)))
        if self.select.unit != "sequence" and self.have[position].any():
            weights = row_weights(self.sources, dialogue, record, self.have[position], self.select)
        found = self._matched(dialogue, weights) if self.matched else self._candidates(dialogue, record, weights)
        place, targets, columns = found
        return Example(
            dialogue=dialogue, input_ids=input_ids, labels=labels, rows=rows[place], targets=targets, **columns
        )

    def _candidates(
        self, dialogue: int, record: Mapping[str, Array], weights: Array
    ) -> tuple[Array | slice, Targets, dict[str, Array]]:
        """Return the rows' targets, and which of them stand where."""
        n_rows = len(weights)
        origin = weights.argmax(axis=1)
        candidates: list[Targets | None] = []
        for c in range(weights.shape[1]):
            if not (weights[:, c] > 0).any() or (c == PIVOT and self.when_pivot_wins == "labels"):
                candidates.append(None)
            elif c == PIVOT:
                candidates.append(Targets.by(record["row.ids"], record["row.logprobs"]))
            else:
                candidates.append(self.sources[c - 1].targets(dialogue, record))
        named = [c for c, targets in enumerate(candidates) if targets is not None]
        if not named:
            return slice(None), Targets.nothing(n_rows), _columns(np.zeros(n_rows), np.ones(n_rows), origin)
        if ((weights > 0).sum(axis=1) <= 1).all():
            targets = self._chosen([c for c in candidates if c is not None], weights[:, named] > 0)
            taught = targets.present()
            return slice(None), targets, _columns(taught, np.ones(n_rows), origin)
        return self._mixed([candidates[c] for c in named], weights[:, named], origin)

    def _chosen(self, candidates: Sequence[Targets], where: Array) -> Targets:
        """Take each row from the one candidate that bool[R, candidates] marks; rows without one are empty."""
        targets = candidates[0]
        for candidate, here in zip(candidates[1:], where.T[1:]):
            targets = targets.replaced(here, candidate)
            targets.partition[here] = candidate.partition[here]
        nobody = ~where.any(axis=1)
        targets.logprobs[nobody], targets.partition[nobody] = -np.inf, False
        return targets

    def _mixed(
        self, candidates: Sequence[Targets | None], weights: Array, origin: Array
    ) -> tuple[Array, Targets, dict[str, Array]]:
        """Mix candidates that are distributions over tokens; those that partition the vocabulary get their own rows.

        The cross-entropy with a mixture is the mixture of the cross-entropies, so that nothing changes by the split.
        """
        width = max(t.width for t in candidates if t is not None)
        every = [t.widened(width) for t in candidates if t is not None]
        present = np.stack([t.present() for t in every], 1)
        cells = np.stack([t.partition for t in every], 1) & present
        weights = np.where(present, weights, 0.0)
        share = weights.sum(axis=1)
        plain = np.where(cells, 0.0, weights)
        plain_share = plain.sum(axis=1)
        ids, logprobs = mix_candidates(
            torch.from_numpy(np.stack([t.ids for t in every], 1)).long(),
            torch.from_numpy(np.stack([t.logprobs for t in every], 1)),
            torch.from_numpy(plain / np.where(plain_share > 0, plain_share, 1.0)[:, None]).float(),
            renormalise=self.renormalise,
        )
        mixture = Targets.by(ids.numpy(), logprobs.numpy())
        places = [np.flatnonzero((plain_share > 0) | (share == 0))]
        parts = [mixture.taken(places[0])]
        row_weights = [np.where(share > 0, plain_share, 1.0)[places[0]]]
        for c, targets in enumerate(every):
            places.append(np.flatnonzero(cells[:, c] & (weights[:, c] > 0)))
            parts.append(targets.taken(places[-1]))
            row_weights.append(weights[places[-1], c])
        place = np.concatenate(places)
        total = np.where(share > 0, share, 1.0)[place]
        return place, _joined(parts), _columns(share[place], np.concatenate(row_weights) / total, origin[place])

    def _matched(self, dialogue: int, weights: Array) -> tuple[Array | slice, Targets, dict[str, Array]]:
        """Return what an objective without a vocabulary map needs of the dialogue's best source."""
        n_rows, best = len(weights), int(weights[0].argmax()) if len(weights) else PIVOT
        origin = np.full(n_rows, best)
        if best == PIVOT:
            columns = _columns(np.zeros(n_rows), np.ones(n_rows), origin)
            columns |= {"chunk": np.full(n_rows, -1, np.int64), "chunk_logprob": np.zeros(0, np.float32)}
            return slice(None), Targets.nothing(n_rows), columns
        found = self.matched[best - 1].at(dialogue)
        taught = found.targets.present() if found.targets.width else found.chunk >= 0
        columns = _columns(taught, np.ones(n_rows), origin)
        return slice(None), found.targets, columns | {"chunk": found.chunk, "chunk_logprob": found.chunk_logprob}


def _columns(taught: Array, row_weight: Array, origin: Array) -> dict[str, Array]:
    return {
        "taught": np.asarray(taught).astype(np.float32),
        "row_weight": row_weight.astype(np.float32),
        "origin": origin.astype(np.int64),
    }


def _joined(parts: Sequence[Targets]) -> Targets:
    width = max(t.width for t in parts)
    every = [t.widened(width) for t in parts]
    names = ("ids", "logprobs") if all(t.low is None for t in every) else ("ids", "logprobs", "low", "high")
    columns: dict[str, Any] = {name: np.concatenate([t.columns()[name] for t in every]) for name in names}
    partition = np.concatenate([t.partition for t in every])
    return Targets(**{"low": None, "high": None} | columns, partition=partition)


def _common_byte_order(sources: Sequence[Source]) -> npt.NDArray[np.int32] | None:
    orders = [s.byte_order for s in sources if s.byte_order is not None]
    if any(not np.array_equal(order, orders[0]) for order in orders):
        raise MismatchError("two sources were aligned to pivots of different vocabularies: align them again")
    return orders[0] if orders else None
