"""Bits per byte of a run's models: how each is scored, which cannot be, and scores kept as they are made."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusechat.artifact import MANIFEST, Json, read_json, write_json
from fusechat.checkpoint import checkpoint_sha256, resolve_model
from fusechat.config import ExtractConfig, RunConfig, SourceConfig, source_name
from fusechat.dialogue import dataset_fingerprint
from fusechat.errors import DataError, FusechatError, first_line
from fusechat.evaluate.bpb import Scores, score_dialogues
from fusechat.extract.settings import extract_settings
from fusechat.layout import Layout
from fusechat.records import Dialogue

SCORED_FORMAT = "fusechat.scored"
# Where a model lies and how it is cut changes no more of its scores than the last bits.
_PLACES = ("device", "device_map", "batch_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One model of a run: a directory or hub id, the options of `score_dialogues`, and whether the run needs it."""

    model: str
    sha256: str
    scoring: Json
    needed: bool


def scoring_options(config: RunConfig, source: SourceConfig | None = None) -> Json:
    """Return how the pivot and what is made from it, or a source, is scored: as it was extracted, in transformers.

    What vLLM spreads over several GPUs, accelerate does here. Every model is given dialogues of the run's length.
    """
    own = extract_settings(config, source)
    return {
        "template": own.template,
        "max_length_tokens": config.extract.max_length_tokens,
        "dtype": own.dtype,
        "device": own.device,
        "device_map": "auto" if _spread(config, source, own) else own.device_map,
        "batch_tokens": own.batch_tokens,
        **({"trust_remote_code": True} if source is not None and own.trust_remote_code else {}),
    }


def _spread(config: RunConfig, source: SourceConfig | None, own: ExtractConfig) -> bool:
    """Return whether vLLM spread a model over several GPUs: by its settings or, where they leave that to the GPUs, by
    what its store says of the engines that made it."""
    if own.backend != "vllm" or own.tensor_parallel_size is not None:
        return (own.tensor_parallel_size or 1) > 1
    layout = Layout(out=Path(config.out), stores=None if config.stores is None else Path(config.stores))
    manifest = layout.store("pivot" if source is None else source_name(source)) / MANIFEST
    engines = read_json(manifest).get("engines", []) if manifest.exists() else []
    return any(engine.get("tensor_parallel_size", 1) > 1 for engine in engines)


def scoring_of(config: RunConfig, model: str) -> Json:
    """Return how a run would score a model that is named by itself: its sources as such, any other as the pivot."""
    places = {Path(source.model).expanduser().resolve(): source for source in config.sources}
    return scoring_options(config, places.get(Path(model).expanduser().resolve()))


def out_of_reach(config: RunConfig, source: SourceConfig) -> str | None:
    """Return why transformers cannot score a source as it was extracted, None when it can be tried."""
    own = extract_settings(config, source)
    if own.backend == "vllm-server":
        return "a server has it"
    if own.quantization is not None:
        return f"only vLLM quantises it to {own.quantization}"
    return None


def models_of(
    config: RunConfig, layout: Layout, targets: Mapping[str, str]
) -> tuple[dict[str, Scored], dict[str, str]]:
    """Return the models of a run to score, and by name why a source is not one of them.

    `targets` are folders by the names of the models in them. Reads every byte of all models, for their fingerprints.
    """
    as_pivot = scoring_options(config)  # targets and the merge speak as the pivot was fused on

    def scored(model: Path | str, scoring: Json, *, needed: bool) -> Scored:
        sha256 = checkpoint_sha256(resolve_model(str(model)))
        return Scored(model=str(model), sha256=sha256, scoring=scoring, needed=needed)

    models = {"pivot": scored(config.pivot, as_pivot, needed=True)}
    left_out = {}
    for source in config.sources if config.eval.sources else ():
        name, why = f"source {source_name(source)}", out_of_reach(config, source)
        if why is None:
            models[name] = scored(source.model, scoring_options(config, source), needed=False)
        else:
            left_out[name] = why
    models |= {name: scored(layout.target(folder), as_pivot, needed=True) for name, folder in targets.items()}
    models["merged"] = scored(layout.merged, as_pivot, needed=True)
    return models, left_out


def score_run(
    models: Mapping[str, Scored],
    held_out: Sequence[Dialogue],
    kept: Path,
    *,
    log_file: Path,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Scores], dict[str, str]]:
    """Score every model that has no scores in the file `kept`, which grows with each; return all scores, and by name
    why a model that the run does not need has none, the first line of what `log_file` has with its traceback.

    `progress(done_models, all_models)` is called after each. Raises what `score_dialogues` does of a model that the run
    needs, and of any model what is neither its fault nor the machine's.
    """
    known: Json = read_json(kept).get("models", {}) if kept.exists() else {}
    fingerprint = dataset_fingerprint(held_out)
    scores: dict[str, Scores] = {}
    failed: dict[str, str] = {}
    log_file.unlink(missing_ok=True)  # of an earlier try
    for done, (name, one) in enumerate(models.items(), 1):
        request = {
            "model_sha256": one.sha256,
            "held_out_fingerprint": fingerprint,
            **{key: value for key, value in one.scoring.items() if key not in _PLACES},
        }
        entry = known.get(name)
        if entry is not None and entry["request"] == request:
            scores[name] = Scores.of(entry["nll"], entry["content_bytes"])
        else:
            try:
                found = _scores(one, held_out)
            except Exception as error:
                if one.needed or not _not_ours(error, one):
                    raise
                failed[name] = first_line(error)
                with log_file.open("a", encoding="utf-8") as log:
                    log.write(f"{name} is not scored\n{''.join(traceback.format_exception(error))}\n")
            else:
                scores[name] = found
                note = {"request": request, "nll": found.nll_json, "content_bytes": found.content_bytes.tolist()}
                known = known | {name: note}
                write_json(kept, {"format": SCORED_FORMAT, "version": 1, "models": known})
            if name in failed:
                _give_back()
        if progress is not None:
            progress(done, len(models))
    return scores, failed


def _not_ours(error: Exception, one: Scored) -> bool:
    """Return whether a model, a file or too little memory is at fault, and not this code."""
    from accelerate.utils.memory import should_reduce_batch_size
    from torch import AcceleratorError, OutOfMemoryError

    if one.scoring.get("trust_remote_code"):  # Python of the model's own may end in anything
        return True
    return isinstance(
        error, (FusechatError, OSError, MemoryError, OutOfMemoryError, AcceleratorError)
    ) or should_reduce_batch_size(error)


def _scores(one: Scored, held_out: Sequence[Dialogue]) -> Scores:
    scores = score_dialogues(one.model, held_out, **one.scoring)
    if not one.needed and not np.isfinite(scores.nll).any():
        raise DataError("no held-out dialogue fits its context")  # nor would any be left to compare the others on
    return scores


def _give_back() -> None:
    """Free what a model that did not fit holds of a device: the next one needs it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
