"""What each source gave: the dialogues on which it predicts better than the pivot, and how much better."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fusechat.artifact import MANIFEST, Json, read_json
from fusechat.errors import FormatError
from fusechat.layout import Layout
from fusechat.report.names import source_names
from fusechat.store import TOPK_FORMAT, Array, format_of, open_aligned, open_topk
from fusechat.twins import TOTALS, are_twins, twin_totals

N_LENGTHS = 5
MAX_POINTS = 1500
_NATS_PER_BIT = float(np.log(2.0))
_COLUMNS = ("index", *TOTALS)


def sources(layout: Layout, config: Json) -> Json:
    """Return, by source, the rows won by MinCE in all, by category and by length, and a sample of the scatter.

    MinCE (arXiv 2408.07990, §3.2): of pivot and source, the one with the lower cross-entropy on a dialogue teaches it.
    A source of the pivot's vocabulary is measured in its own store. Raises FormatError when no source is aligned.
    """
    names = source_names(config)
    stores = {name: layout.store(name) for name in names if are_twins(layout.store("pivot"), layout.store(name))}
    stores |= {name: layout.aligned(name) for name in names if (layout.aligned(name) / MANIFEST).exists()}
    there = [name for name in names if name in stores]
    if not there:
        raise FormatError(f"no source is aligned yet: {layout.aligned('*')} is not there")
    unit = config.get("train", {}).get("ce_unit", "byte")
    categories, category_names = _categories(layout)
    columns = {name: _dialogues(layout.store("pivot"), stores[name]) for name in there}
    edges = _length_edges([d["content_bytes"][d["content_bytes"] > 0] for d in columns.values()])
    limit = MAX_POINTS // len(there)
    found = {name: _source(d, unit, categories, category_names, edges, limit) for name, d in columns.items()}
    return {
        "ce_unit": unit,
        "select": config.get("train", {}).get("select", "min_ce"),
        "by_source": found,
        "absent": [name for name in names if name not in there],
        "has_categories": len(category_names) > 1,
    }


def _dialogues(pivot: Path, source: Path) -> dict[str, Array]:
    """Return _COLUMNS of every dialogue of the pivot's from an AlignedStore, or from a source's own store.

    `differs`: the source has encoded the dialogue, but with other tokens of the assistant's than the pivot's, and
    without alignment there is nothing to compare.
    """
    if format_of(source) == TOPK_FORMAT:
        store = open_topk(pivot, verify=False)
        own = open_topk(source, verify=False)
        totals = twin_totals(store, own)
        unknown = (np.nan,) * len(TOTALS)
        values = np.array([totals.get(dialogue, unknown) for dialogue in store])
        differs = np.array([dialogue in own and dialogue not in totals for dialogue in store])
        return {"index": np.array(list(store)), **dict(zip(TOTALS, values.T)), "differs": differs}
    store = open_aligned(source, verify=False)
    shards = [store.shard(i) for i in range(store.n_shards)]
    columns = {name: np.concatenate([shard[f"dialogue.{name}"] for shard in shards]) for name in _COLUMNS}
    return columns | {"differs": np.zeros(len(columns["index"]), np.bool_)}


def _categories(layout: Layout) -> tuple[npt.NDArray[np.int64], list[str]]:
    if not layout.categories.exists():
        return np.zeros(0, np.int64), []
    table = read_json(layout.categories)
    return np.asarray(table["category"], np.int64), list(table["names"])


def _source(
    d: dict[str, Array],
    unit: str,
    categories: npt.NDArray[np.int64],
    names: list[str],
    edges: npt.NDArray[np.int64],
    max_points: int,
) -> Json:
    known = np.isfinite(d["source_nll"]) & np.isfinite(d["pivot_nll"]) & (d["content_bytes"] > 0)
    index, size, rows = d["index"][known], d["content_bytes"][known].astype(np.float64), d["pivot_tokens"][known]
    source, pivot = d["source_nll"][known].astype(np.float64), d["pivot_nll"][known].astype(np.float64)
    if unit == "token":
        won = source / np.maximum(d["source_tokens"][known], 1) < pivot / np.maximum(rows, 1)
    else:
        won = source < pivot
    groups: list[tuple[str, npt.NDArray[np.bool_]]] = []
    if len(names) > 1 and len(index) and index.max() < len(categories):
        groups = [(name or "(none)", categories[index] == i) for i, name in enumerate(names)]
    chosen = np.sort(np.random.default_rng(0).permutation(len(index))[:max_points])
    bits = 1 / (size * _NATS_PER_BIT)
    return {
        "n_dialogues": len(d["index"]),
        "compared": int(known.sum()),
        "differing": int(d["differs"].sum()),
        "all": _won("all", won, rows, np.ones(len(won), np.bool_)),
        "source_bits_per_byte": float(source.sum() / _NATS_PER_BIT / size.sum()) if len(size) else None,
        "pivot_bits_per_byte": float(pivot.sum() / _NATS_PER_BIT / size.sum()) if len(size) else None,
        "by_category": [_won(name, won, rows, members) for name, members in groups if members.any()],
        "by_length": [_won(name, won, rows, members) for name, members in _lengths(size, edges)],
        "points": [
            [round(float(p), 4), round(float(s), 4), bool(w)]
            for p, s, w in zip((pivot * bits)[chosen], (source * bits)[chosen], won[chosen], strict=True)
        ],
    }


def _won(name: str, won: npt.NDArray[np.bool_], rows: Array, members: npt.NDArray[np.bool_]) -> Json:
    n_rows = int(rows[members].sum())
    n_won = int(rows[members & won].sum())
    return {
        "name": name,
        "n_dialogues": int(members.sum()),
        "n_dialogues_won": int((members & won).sum()),
        "n_rows": n_rows,
        "n_rows_won": n_won,
        "share": n_won / n_rows if n_rows else None,
    }


def _length_edges(sizes: list[Array]) -> npt.NDArray[np.int64]:
    """Return where dialogues are split by length, as many in each part as ties allow: the same for every source."""
    size_bytes = np.concatenate(sizes)
    if not len(size_bytes):
        return np.zeros(0, np.int64)
    edges = np.unique(np.quantile(size_bytes, np.linspace(0, 1, N_LENGTHS + 1)).astype(np.int64))
    return np.append(edges[:-1], edges[-1] + 1)


def _lengths(size: Array, edges: npt.NDArray[np.int64]) -> list[tuple[str, npt.NDArray[np.bool_]]]:
    return [
        (f"{low}–{high - 1}" if high - 1 > low else f"{low}", (size >= low) & (size < high))
        for low, high in itertools.pairwise(edges.tolist())
    ]
