"""The stage: one source's TopKStore, carried over to the pivot's positions and vocabulary, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fusechat.align.coverage import coverage
from fusechat.align.on_ray import map_on_ray
from fusechat.align.rows import n_threads
from fusechat.align.shards import ShardWork, Task
from fusechat.align.statistics import no_counts
from fusechat.artifact import (
    MANIFEST,
    Json,
    ShardedWriter,
    atomic_write,
    read_json,
    read_manifest,
    sha256_file,
    write_json,
)
from fusechat.config import AlignConfig
from fusechat.errors import ConfigError, FormatError, MismatchError
from fusechat.ray import ray_cluster
from fusechat.store import ALIGNED_FORMAT, Store, open_topk, shard_name

Progress = Callable[[int, int], None]
COVERAGE = "coverage.json"
BYTE_ORDER = "byte_order.safetensors"

PRESETS = {
    # The research code's default mode.
    "paper": {
        "tokens": "dtw",
        "vocab": "ms-upstream",
        "granularity": "first",
        "unaligned": "pivot",
        "collisions": "first",
    }
}


def align(
    pivot_store: Path | str,
    source_store: Path | str,
    out: Path | str,
    *,
    tokens: str = "bytes",
    vocab: str = "prefix",
    granularity: str = "cells",
    unaligned: str = "gold",
    collisions: str = "sum",
    preset: str | None = None,
    workers: int | None = None,
    ray: str | None = None,
    progress: Progress | None = None,
) -> Json:
    """Write the AlignedStore of one source and return its manifest; resumes at the first missing shard.

    Shards follow the pivot's. `preset: paper` sets the five choices to the research code's default mode and refuses
    others; with `tokens: dtw` rows are taken as they stand (`granularity: first`). `workers` is the number of threads
    (all of this process when None). `ray` is the address of a Ray cluster that sees the same files, or "local": shards
    are then made there, by actors of `workers` threads each (one when None). The output is the same for any of these.
    `progress(done_rows, all_rows)` is called after every shard. The manifest's `coverage` says what became of rows and
    probability. Raises ConfigError for an unknown choice and where Ray is absent, FormatError for a store that is
    incomplete or corrupt, MismatchError for stores of different dialogues, for a tokenizer that is not the store's, and
    when `out` was made from other inputs.
    """
    chosen = chosen_rules(
        preset=preset,
        tokens=tokens,
        vocab=vocab,
        granularity=granularity,
        unaligned=unaligned,
        collisions=collisions,
    )
    pivot, source = open_topk(Path(pivot_store)), open_topk(Path(source_store))
    _want_same_dialogues(pivot, source)
    writer = ShardedWriter(Path(out), _request(pivot, source, chosen))
    if writer.complete:
        return read_manifest(writer.directory, ALIGNED_FORMAT)
    task = Task(
        pivot_store=pivot.directory,
        source_store=source.directory,
        out=writer.directory,
        chosen=chosen,
        threads=workers or (n_threads() if ray is None else 1),
    )
    work = ShardWork(task)  # here in any case: what does not fit together is refused before a cluster is asked
    with writer, nullcontext() if ray is None else ray_cluster(ray) as cluster:
        if not writer.begin():
            return read_manifest(writer.directory, ALIGNED_FORMAT)
        _make_missing(work, cluster, writer, progress)
        return _finish(writer, work)


def _make_missing(work: ShardWork, cluster: Any, writer: ShardedWriter, progress: Progress | None) -> None:
    def results(what: str, numbers: list[int]) -> Iterator[tuple[int, Any]]:
        if cluster is not None:
            return map_on_ray(cluster, work.task, work.corpus, what, numbers)
        return ((number, getattr(work, what)(number)) for number in numbers)

    shards = work.pivot.manifest["shards"]
    missing = [number for number in range(len(shards)) if shard_name(number) not in writer.done]
    all_rows = sum(shard["n_rows"] for shard in shards)
    done_rows = all_rows - sum(shards[number]["n_rows"] for number in missing)
    if missing and work.task.chosen["vocab"].startswith("ms"):
        # Of all shards, those done before included: the map must be the same after an interruption.
        counted = [counts for _, counts in results("count", list(range(len(shards))))]
        work.aligner.counts = sum(counted, start=no_counts())
    for number, note in results("write", missing):
        writer.done[note["file"]] = note
        done_rows += shards[number]["n_rows"]
        if progress is not None:
            progress(done_rows, all_rows)


def chosen_rules(
    *, preset: str | None, tokens: str, vocab: str, granularity: str, unaligned: str, collisions: str
) -> dict[str, str]:
    """Return the five choices of an alignment, `preset` applied; raises ConfigError when they do not fit together."""
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"align.preset: {preset!r} is not one of {', '.join(PRESETS)}")
    chosen = {
        "tokens": tokens,
        "vocab": vocab,
        "granularity": granularity,
        "unaligned": unaligned,
        "collisions": collisions,
    }
    for key, value in PRESETS.get(preset or "", {}).items():
        if chosen[key] not in (value, AlignConfig.model_fields[key].default):
            raise ConfigError(
                f"align.preset: {preset} is {key}: {value}: leave out align.{key}: {chosen[key]}, or the preset"
            )
        chosen[key] = value
    for key, value in chosen.items():
        known = get_args(AlignConfig.model_fields[key].annotation)
        if value not in known:
            raise ConfigError(f"align.{key}: {value!r} is not one of {', '.join(known)}")
    if chosen["tokens"] == "dtw" and chosen["granularity"] != "first":
        raise ConfigError(
            f"align.granularity: {chosen['granularity']!r} needs byte offsets, which tokens: dtw does not look at: "
            "set align.granularity: first, or align.preset: paper"
        )
    return chosen


def _want_same_dialogues(pivot: Store, source: Store) -> None:
    key = "dataset_fingerprint"
    if pivot.manifest[key] != source.manifest[key]:
        raise MismatchError(
            f"{pivot.directory} and {source.directory} hold different dialogues (dataset {pivot.manifest[key]} and "
            f"{source.manifest[key]}): extract both from the same data"
        )


def _request(pivot: Store, source: Store, chosen: dict[str, str]) -> Json:
    return {
        "format": ALIGNED_FORMAT,
        "version": 1,
        "dataset_fingerprint": pivot.manifest["dataset_fingerprint"],
        "pivot_store_sha256": sha256_file(pivot.directory / MANIFEST),
        "source_store_sha256": sha256_file(source.directory / MANIFEST),
        "pivot_tokenizer_sha256": pivot.manifest["tokenizer_sha256"],
        "source_tokenizer_sha256": source.manifest["tokenizer_sha256"],
        "vocab_size": pivot.manifest["vocab_size"],
        **chosen,
    }


def _finish(writer: ShardedWriter, work: ShardWork) -> Json:
    aligner = work.aligner
    tallies = [writer.done[name].pop("tally") for name in sorted(writer.done)]
    report = coverage(tallies, aligner.source.table)
    write_json(writer.directory / COVERAGE, report)
    if aligner.choices.granularity == "cells":
        with atomic_write(writer.directory / BYTE_ORDER) as partial:
            save_file({"byte_order": aligner.byte_order}, partial)
    return writer.finish(
        pivot_store=str(work.task.pivot_store.resolve()),
        source_store=str(work.task.source_store.resolve()),
        coverage={key: report[key] for key in ("rows", "n_rows", "mass", "mass_by_kind")},
    )


def read_byte_order(directory: Path) -> npt.NDArray[np.int32]:
    """Return the pivot's ids in the order of their bytes, int32[V], which the ranges of `granularity: cells` refer to.

    Raises FormatError when the store has none.
    """
    try:
        order: npt.NDArray[np.int32] = load_file(directory / BYTE_ORDER)["byte_order"]
    except (OSError, KeyError, SafetensorError) as error:
        raise FormatError(f"{directory / BYTE_ORDER} cannot be read: align again with granularity: cells") from error
    return order


def read_coverage(directory: Path) -> Json:
    """Return an AlignedStore's whole coverage report; raises FormatError when it is not there."""
    report = read_json(directory / COVERAGE)
    if not isinstance(report, dict):
        raise FormatError(f"{directory / COVERAGE} is not a coverage report")
    return report
