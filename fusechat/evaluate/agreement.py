"""How far a model predicts what its sources predict, on the places where both stand before the same text.

Per shared row: `top1`, whether both put the same bytes first; `top1_prefix`, whether the one's first choice begins with
the other's, so that they agree as far as the shorter speaks; `topk`, the share of the source's k candidates, as far as
the model has tokens of the same bytes, that are among the model's k; `kl_bits`, KL(source ‖ model) in bits over these
candidates and one cell for all the rest. By the data-processing inequality that is a lower bound of the divergence of
the whole distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusechat.bytetable import ByteTable
from fusechat.checkpoint import resolve_model
from fusechat.encode import encode_all
from fusechat.errors import ConfigError, DataError
from fusechat.evaluate.bootstrap import SIGNIFICANCE, Ratio, comparison_table
from fusechat.evaluate.bpb import category_groups
from fusechat.evaluate.shared_rows import (
    Floats,
    Ints,
    measure_rows,
    prefix_agreement,
    row_places,
    twins,
)
from fusechat.extract.hf import score_rows
from fusechat.model import check_head, context_tokens, embedding_rows, head, hidden_states, load_model
from fusechat.records import Dialogue, Encoded
from fusechat.store import row_positions
from fusechat.template import load_template
from fusechat.tokenizer import load_tokenizer
from fusechat.turn_end import turn_end_token

MEASURES = ("top1", "top1_prefix", "topk", "kl_bits")
_CHUNK_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """A source's view of a data set: per dialogue its rows' places int64[R] (ascending, unique), top-k ids int64[R,K]
    and log-probabilities float64[R,K]; the byte table, and the token that ends its turns (None when none does)."""

    places: dict[int, Ints]
    ids: dict[int, Ints]
    logprobs: dict[int, Floats]
    table: ByteTable
    turn_end: int | None


class _Loaded:
    """A model with its encodings of a data set."""

    def __init__(
        self, model: str, dialogues: Sequence[Dialogue], template: str, max_length_tokens: int, dtype: str, device: str
    ) -> None:
        self.name = model
        directory = resolve_model(model)
        tokenizer = load_tokenizer(directory)
        self.lm = load_model(directory, dtype=dtype, device=device)
        self.table = ByteTable.from_tokenizer(tokenizer, embedding_rows(self.lm))
        found = encode_all(
            dialogues,
            tokenizer,
            self.table,
            template=load_template(tokenizer, template),
            max_length_tokens=context_tokens(self.lm.config, max_length_tokens),
        )
        self.index, self.encoded = found.index, found.encoded
        blocks = ((one.input_ids, one.turn, np.array([0, len(one.turn)])) for one in self.encoded)
        self.turn_end = turn_end_token(blocks, self.table)
        check_head(self.lm, self.encoded[0].input_ids)


def _candidates(loaded: _Loaded, top_k: int, batch_tokens: int) -> Candidates:
    places, ids, logprobs = {}, {}, {}
    scores = score_rows(loaded.lm, loaded.encoded, top_k=top_k, batch_tokens=batch_tokens)
    for dialogue, encoded, score in zip(loaded.index, loaded.encoded, scores):
        if np.isnan(score.logprobs).any():
            raise DataError(f"{loaded.name} gives NaN on held-out dialogue {dialogue}: it is broken")
        places[dialogue], positions = row_places(encoded)
        rows = np.searchsorted(row_positions(encoded.loss_mask), positions)
        ids[dialogue] = score.ids[rows].astype(np.int64)
        logprobs[dialogue] = score.logprobs[rows].astype(np.float64)
    return Candidates(places=places, ids=ids, logprobs=logprobs, table=loaded.table, turn_end=loaded.turn_end)


@torch.inference_mode()
def _row_hidden(lm: Any, encoded: Encoded, positions: Ints) -> torch.Tensor:
    input_ids = torch.from_numpy(encoded.input_ids.astype(np.int64))[None].to(lm.device)
    return hidden_states(lm, input_ids, torch.ones_like(input_ids))[0][torch.from_numpy(positions).to(lm.device)]


@torch.inference_mode()
def _own_probability(lm: Any, hidden: torch.Tensor, twin: Ints, wanted: Ints, top_k: int) -> tuple[Ints, Floats]:
    """Return the model's own top-k ids and its probabilities of `wanted` int64[R,M], rows in chunks.

    Tokens of the same bytes count as one, the one `twin` names: a byte token and a word of one letter, say.
    """
    parts = head(lm)
    spelled_twice = np.flatnonzero((twin >= 0) & (twin != np.arange(len(twin))))
    doubles, firsts = torch.from_numpy(spelled_twice), torch.from_numpy(twin[spelled_twice])
    top, probability = [], []
    for start in range(0, len(wanted), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        p = parts.logits(hidden[rows]).softmax(dim=1)
        p.index_add_(1, firsts.to(p.device), p[:, doubles.to(p.device)])
        p[:, doubles.to(p.device)] = 0
        top.append(p.topk(top_k, dim=1).indices.cpu().numpy())
        probability.append(p.gather(1, torch.from_numpy(wanted[rows]).to(p.device)).double().cpu().numpy())
    return np.concatenate(top), np.concatenate(probability)


def _compare_model(
    loaded: _Loaded, sources: Mapping[str, Candidates], n_dialogues: int, top_k: int
) -> dict[str, dict[str, Floats]]:
    """Return by source the sums of every measure, of the shared `rows` and of `all_rows` per dialogue, float64[n]."""
    if top_k > len(loaded.table):
        raise ConfigError(f"top_k is {top_k}, and {loaded.name} has {len(loaded.table)} tokens: lower it")
    maps = {name: twins(loaded.table, loaded.turn_end, s.table, s.turn_end) for name, s in sources.items()}
    sums = {name: {key: np.zeros(n_dialogues) for key in (*MEASURES, "rows", "all_rows")} for name in sources}
    for dialogue, encoded in zip(loaded.index, loaded.encoded):
        places, positions = row_places(encoded)
        hidden = _row_hidden(loaded.lm, encoded, positions)
        for name, source in sources.items():
            total = sums[name]
            total["all_rows"][dialogue] = len(places)
            _, here, there = np.intersect1d(
                places, source.places.get(dialogue, np.zeros(0, np.int64)), assume_unique=True, return_indices=True
            )
            if not len(here):
                continue
            own_twin, source_twin = maps[name]
            ids, logprobs = source.ids[dialogue][there], source.logprobs[dialogue][there]
            own_top, probability = _own_probability(
                loaded.lm, hidden[here], own_twin, np.maximum(source_twin[ids], 0), top_k
            )
            values = measure_rows(own_top, own_twin, ids, source_twin, np.exp(logprobs), probability)
            values["top1_prefix"] = prefix_agreement(own_top, loaded.table, ids, source.table, values["top1"])
            if np.isnan(probability).any():
                raise DataError(f"{loaded.name} gives NaN on held-out dialogue {dialogue}: it is broken")
            for key, value in values.items():
                total[key][dialogue] = value.sum()
            total["rows"][dialogue] = len(here)
    return sums


def agreement(
    models: Mapping[str, Path | str],
    sources: Mapping[str, Path | str],
    dialogues: Sequence[Dialogue],
    *,
    top_k: int = 10,
    template: str = "own",
    max_length_tokens: int = 2048,
    dtype: str = "auto",
    device: str = "auto",
    batch_tokens: int = 8192,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return every model's agreement with every source by category, with differences to the first model, as JSON.

    One model is in memory at a time. Raises DataError when a model and a source share no row, or one is broken.
    """
    done = 0

    def load(model: Path | str) -> _Loaded:
        nonlocal done
        if progress is not None:
            progress(done, len(models) + len(sources))
        done += 1
        return _Loaded(str(model), dialogues, template, max_length_tokens, dtype, device)

    candidates = {name: _candidates(load(model), top_k, batch_tokens) for name, model in sources.items()}
    sums = {name: _compare_model(load(model), candidates, len(dialogues), top_k) for name, model in models.items()}
    if progress is not None:
        progress(done, done)
    against = next(iter(models))
    out: dict[str, Any] = {"top_k": top_k, "significance": SIGNIFICANCE, "sources": {}}
    for source in sources:
        for name in models:
            if not sums[name][source]["rows"].any():
                raise DataError(f"{name} and {source} share no row of the dialogues: no text fits the context of both")
        measured = np.flatnonzero(np.all([sums[name][source]["rows"] > 0 for name in models], axis=0))
        if not len(measured):
            raise DataError(f"no dialogue has rows that every model shares with {source}: use shorter dialogues")
        groups = category_groups(measured, [dialogue.category for dialogue in dialogues])
        tables = {
            key: comparison_table(
                {
                    group: {
                        n: Ratio(numerator=sums[n][source][key][members], denominator=sums[n][source]["rows"][members])
                        for n in models
                    }
                    for group, members in groups.items()
                },
                value_name="value",
                against=against,
                samples=samples,
                confidence=confidence,
                seed=seed,
            )
            for key in MEASURES
        }
        out["sources"][source] = {
            "shared_rows": {n: int(sums[n][source]["rows"][measured].sum()) for n in models},
            "shared_share": {
                n: float(sums[n][source]["rows"][measured].sum() / sums[n][source]["all_rows"][measured].sum())
                for n in models
            },
            "groups": {
                group: {
                    "n_dialogues": len(members),
                    "models": {n: {key: tables[key][group][n] for key in MEASURES} for n in models},
                }
                for group, members in groups.items()
            },
        }
    return out
