"""Training: one target from the pivot and one source, or all of them, and a control that sees the same data alone.

L = λ·L_SFT + (1−λ)·L_Fusion (arXiv 2408.07990), L_Fusion the divergence of the target's distribution from the pivot's
or a source's, whichever predicts the text better. The same call works under python, torchrun and accelerate launch.
"""

from __future__ import annotations

import gc
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fusechat
from fusechat.artifact import (
    MANIFEST,
    PARTIAL_SUFFIX,
    PROVENANCE,
    REQUEST,
    Json,
    differences,
    full_disk_is_named,
    locked,
    read_json,
    sha256_file,
    write_json,
)
from fusechat.bytetable import ByteTable
from fusechat.callable_module import make_callable
from fusechat.checkpoint import checkpoint_sha256, resolve_model
from fusechat.config_values import validated
from fusechat.dialogue import check_dialogues, dataset_fingerprint
from fusechat.errors import ConfigError, MismatchError
from fusechat.layout import TRAINING_LOG
from fusechat.processes import first_does, n_processes
from fusechat.records import Dialogue
from fusechat.store import Store, open_topk
from fusechat.train.dataset import FusionDataset
from fusechat.train_config import TrainConfig

__all__ = ["train"]
make_callable(__name__)

TARGET_FORMAT = "fusechat.target"
# They change how a training runs and what is seen of it, not what comes out but for the last bits: a run that does not
# fit, or is watched too seldom, goes on with others.
_FREE_TO_CHANGE = {
    "workers", "report_to", "logging_steps", "save_steps", "save_total_limit", "timeout_minutes", "loss_budget_bytes",
    "micro_batch_size", "gradient_checkpointing", "torch_compile", "attention",
}  # fmt: skip


def train(
    pivot: str | Path,
    pivot_store: Path | str,
    aligned_store: Path | str | Sequence[Path | str] | None,
    out: Path | str,
    config: TrainConfig | None = None,
    *,
    seed: int = 0,
    held_out: Sequence[Dialogue] = (),
    progress: Callable[[int, int], None] | None = None,
    dry_run: bool = False,
    **options: Any,
) -> Json:
    """Train one target from the pivot and return its provenance; without an aligned store, the SFT control.

    `options` are keys of `TrainConfig`, instead of `config`.

    A store is a source's AlignedStore, or its TopKStore where its byte table is the pivot's; several are taught at
    once. `out` becomes a Hugging Face model directory; checkpoints lie in `out` + ".partial" until it is whole, and a
    run that was killed resumes at the last one with the same result. `held_out` dialogues are scored with every
    checkpoint. `progress(done_steps, all_steps)` is called after every step. `dry_run` takes two steps on two dialogues
    and leaves nothing. Under a launcher every process calls it, and each returns the same.

    Raises ConfigError for unknown options, MismatchError when `out` or the stores were made from other inputs,
    DataError when a loss is NaN, Stopped after SIGTERM and Interrupted, a kind of it, after SIGINT.
    """
    if config is None:
        config = validated(TrainConfig, options, "train")
    elif options:
        raise ConfigError(f"train takes a configuration or options, not both: {', '.join(options)}")
    if len(held_out):
        check_dialogues(held_out)
    pivot, pivot_store, out = str(pivot), Path(pivot_store), Path(out)
    several = [aligned_store] if isinstance(aligned_store, Path | str) else aligned_store or []
    stores = [Path(store) for store in several]
    _join_processes(config)
    if dry_run:
        small = {
            "max_steps": 2,
            "batch_size": n_processes(),
            "micro_batch_size": 1,
            "logging_steps": 1,
            "final": "last",
        }
        with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
            place = Path(first_does(lambda: folder)) / "target"
            config = config.model_copy(update=small)
            return _train(pivot, pivot_store, stores, place, config, seed, held_out[:2], progress, held, dry_run=True)
    with ExitStack() as held:
        return _train(pivot, pivot_store, stores, out, config, seed, held_out, progress, held, dry_run=False)


def _train(
    pivot: str,
    pivot_store: Path,
    stores: list[Path],
    out: Path,
    config: TrainConfig,
    seed: int,
    held_out: Sequence[Dialogue],
    progress: Callable[[int, int], None] | None,
    until_done: ExitStack,
    dry_run: bool,
) -> Json:
    from fusechat.train.fit import fit

    if config.final == "best" and not held_out:
        raise ConfigError("train.final: best needs held-out dialogues to choose by: give --held-out")
    directory = resolve_model(pivot)
    work = out.with_name(out.name + PARTIAL_SUFFIX)
    request, done = first_does(
        lambda: _begin(directory, pivot_store, stores, out, work, config, seed, held_out, until_done)
    )
    if done is not None:
        return dict(done)
    store = open_topk(pivot_store)
    dataset = _dataset(store, stores, config, limit=2 if dry_run else None)
    scored = None
    if held_out:
        from fusechat.tokenizer import load_tokenizer
        from fusechat.train.held_out import encode_held_out

        tokenizer = load_tokenizer(directory)
        table = ByteTable.from_tokenizer(tokenizer, store.manifest["vocab_size"])
        scored = encode_held_out(held_out, tokenizer, table, store.manifest, config.micro_batch_size)
    with full_disk_is_named(work):
        fitted = fit(
            directory, dataset, work, config, seed, held_out=scored, progress=progress, checkpoints=not dry_run
        )
    gc.collect()  # the trainer is a cycle, and holds a model and an optimiser on the device
    if dry_run:
        return {"n_dialogues": len(dataset), "source_share": dataset.source_share, "losses": fitted.losses}

    def finish() -> Json:
        from fusechat.train.export import save_target, write_card

        provenance: Json = {
            "format": TARGET_FORMAT,
            "version": 1,
            "pivot": str(directory.resolve()),
            "aligned_store": str(stores[0]) if len(stores) == 1 else None,
            "sources": [
                {"name": source.name, "store": str(path), "store_sha256": sha256_file(path / MANIFEST), "share": share}
                for source, path, share in zip(dataset.sources, stores, dataset.weights[1:].mean(axis=1).tolist())
            ],
            "dataset_fingerprint": store.manifest.get("dataset_fingerprint", ""),
            "n_dialogues": len(dataset),
            "source_share": dataset.source_share,
            "losses": fitted.losses,
            "measured": {
                "first_loss": fitted.losses[0] if fitted.losses else None,
                "last_loss": fitted.losses[-1] if fitted.losses else None,
                "held_out_bits_per_byte": fitted.held_out,
                "best_step": fitted.best_step,
            },
            "processes": n_processes(),
            "sharding": fitted.sharding,
            "versions": {"fusechat": fusechat.__version__, "python": platform.python_version()}
            | {name: version(name) for name in ("torch", "transformers", "accelerate", "numpy")},
            "request": request,
        }
        assert fitted.state is not None
        shutil.rmtree(work / "model", ignore_errors=True)  # a kill may have left half of one
        with full_disk_is_named(work):
            save_target(directory, fitted.state, config, work / "model")
            for left in (TRAINING_LOG, "tensorboard"):
                if (work / left).exists():
                    (work / left).rename(work / "model" / left)
            write_card(work / "model", provenance)
        write_json(work / "model" / PROVENANCE, provenance)
        if _target_at(out) is not None:
            raise MismatchError(f"{out} has become a target while this one was trained: choose another place")
        (work / "model").replace(out)
        shutil.rmtree(work)
        return provenance

    return dict(first_does(finish))


def _join_processes(config: TrainConfig) -> None:
    if n_processes() > 1:
        from accelerate import PartialState
        from torch.cuda import is_available

        PartialState(cpu=not is_available(), timeout=timedelta(minutes=config.timeout_minutes))


def _begin(
    directory: Path,
    pivot_store: Path,
    stores: list[Path],
    out: Path,
    work: Path,
    config: TrainConfig,
    seed: int,
    held_out: Sequence[Dialogue],
    until_done: ExitStack,
) -> tuple[Json, Json | None]:
    """Say what is asked for, and return it with the provenance of a target that is there already.

    Otherwise `work` is locked until `until_done` is closed; raises FusechatError when another process trains there.
    """
    pivot_sha256 = checkpoint_sha256(directory)
    manifest = open_topk(pivot_store, verify=False).manifest
    # A served model's weights have no fingerprint here.
    if manifest.get("backend") != "vllm-server" and manifest["model_sha256"] != pivot_sha256:
        raise MismatchError(
            f"{pivot_store} was extracted from another pivot ({manifest['model_sha256'][:12]}… there, "
            f"{pivot_sha256[:12]}… is {directory}): extract it again, or train from that pivot"
        )
    from fusechat.tokenizer import load_tokenizer

    tokenizer_sha256 = ByteTable.from_tokenizer(load_tokenizer(directory), manifest["vocab_size"]).sha256
    if manifest["tokenizer_sha256"] != tokenizer_sha256:
        raise MismatchError(
            f"{pivot_store} was tokenised by another tokenizer ({manifest['tokenizer_sha256'][:12]}… there, "
            f"{tokenizer_sha256[:12]}… is {directory}'s): extract it again"
        )
    if config.mode == "pairwise" and len(stores) > 1:
        raise ConfigError(f"train.mode: pairwise takes one source, {len(stores)} were given: set it to multi")
    request = {"pivot_sha256": pivot_sha256, **_settings(pivot_store, stores, config, seed, held_out)}
    found = _target_at(out)
    if found is None:
        work.mkdir(parents=True, exist_ok=True)
        until_done.callback(_remove_if_empty, work)
        until_done.enter_context(locked(work))
        found = _target_at(out)  # made by another process since the first look
    if found is not None:
        _require_same(out, request, found["request"])
        return request, found
    if (work / REQUEST).exists():
        _require_same(work, request, read_json(work / REQUEST))
    write_json(work / REQUEST, request)
    return request, None


def _target_at(out: Path) -> Json | None:
    """Return the provenance of the target at `out`, None where nothing is; raises MismatchError for anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    found = read_json(out / PROVENANCE) if (out / PROVENANCE).exists() else None
    if not isinstance(found, dict) or found.get("format") != TARGET_FORMAT:
        raise MismatchError(f"{out} exists and is not a target of ours: choose another place")
    return found


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _settings(
    pivot_store: Path, stores: Sequence[Path], config: TrainConfig, seed: int, held_out: Sequence[Dialogue]
) -> Json:
    """Return what a target is made from, all but the pivot's weights, whose hash is in its store too."""
    return {
        "format": TARGET_FORMAT,
        "version": 1,
        "pivot_store_sha256": sha256_file(pivot_store / MANIFEST),
        "source_stores_sha256": [sha256_file(store / MANIFEST) for store in stores],
        "train": config.model_dump(),
        "seed": seed,
        **({"chosen_on_fingerprint": dataset_fingerprint(held_out)} if config.final == "best" else {}),
    }


def refuse_other_target(
    pivot_store: Path,
    stores: Sequence[Path],
    out: Path,
    config: TrainConfig,
    *,
    seed: int,
    held_out: Sequence[Dialogue],
) -> None:
    """Raise MismatchError, as `train` would, where `out`, or what is unfinished of it, is of other settings or stores.

    It writes nothing, and reads no weights.
    """
    settings = _settings(pivot_store, stores, config, seed, held_out)
    unfinished = out.with_name(out.name + PARTIAL_SUFFIX)
    target = _target_at(out)
    if target is not None:
        place, found = out, target["request"]
    elif (unfinished / REQUEST).exists():
        place, found = unfinished, read_json(unfinished / REQUEST)
    else:
        return
    _require_same(place, settings, {key: value for key, value in found.items() if key != "pivot_sha256"})


def _dataset(store: Store, paths: list[Path], config: TrainConfig, limit: int | None) -> FusionDataset:
    from fusechat.train.matched import open_matched
    from fusechat.train.select import Selection
    from fusechat.train.source import open_source

    objective = config.objective
    dataset = FusionDataset(
        store,
        [open_source(path, store, path.name) for path in paths],
        select=Selection(
            rule=config.select, unit=config.select_unit, ce_unit=config.ce_unit, weights=config.source_weights
        ),
        when_pivot_wins=config.when_pivot_wins,
        renormalise=config.missing == "renormalise",
        matched=[] if objective == "soft" else [open_matched(path, store, objective) for path in paths],
        limit=limit,
    )
    if config.compat == "upstream" and dataset.byte_order is not None:
        raise ConfigError("train.compat: upstream knows no ranges of tokens: align with another granularity than cells")
    return dataset


def _require_same(place: Path, request: Json, found: Json) -> None:
    free = _FREE_TO_CHANGE | {"train"}
    if request["train"]["final"] == "best":
        free -= {"save_steps"}  # they say what there is to choose from
    flat, old = ({k: v for k, v in {**r, **r.get("train", {})}.items() if k not in free} for r in (request, found))
    if flat != old:
        what = "; ".join(differences(flat, old))
        raise MismatchError(f"{place} was trained from other inputs ({what}): remove it or choose another place")
