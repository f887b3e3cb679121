"""Many merges of the same models, compared on validation text; the best is kept.

    sweep:
      - {merge_method: linear, parameters: {weight: 1.0}}
      - merge_method: sce
        parameters: {variant: paper}
        each: {select_topk: [0.1, 0.5, 1.0]}

An entry is a merge of the recipe's models; `each` lists values, and every combination of them is a merge (a plain list
would be a gradient over layers). Weights and densities of an entry are given to every model.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.artifact import PROVENANCE, Json, differences, read_json, sha256_json, write_json
from fusechat.errors import ConfigError, MismatchError, nearest
from fusechat.merge.config import load_merge_config, parse_merge_config
from fusechat.merge.driver import merge
from fusechat.merge.inputs import open_model
from fusechat.merge.layout import MAX_SHARD_BYTES
from fusechat.merge.methods import METHODS
from fusechat.yaml_file import read_yaml

if TYPE_CHECKING:
    from fusechat.evaluate.bpb import Scores
    from fusechat.records import Dialogue

FORMAT = "fusechat.sweep"
TABLE = "sweep.json"
FOLDER_SUFFIX = ".sweep"
_ENTRY_KEYS = ("merge_method", "parameters", "each")
# Of `merge`: what its bytes depend on, with its defaults.
_RESULT_OPTIONS: Json = {"allow_nonfinite": False, "max_shard_bytes": MAX_SHARD_BYTES, "device": "cpu"}
Score = Callable[[Path], "Scores"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One merge of a sweep: a short name, and its recipe in mergekit's form."""

    name: str
    recipe: Mapping[str, Any]


def load_sweep(path: Path | str) -> tuple[Json, list[Any]]:
    """Read a merge's YAML file with a `sweep` list; returns the recipe without it, and the list. Raises ConfigError."""
    raw = read_yaml(Path(path))
    if not isinstance(raw, dict) or not isinstance(raw.get("sweep"), list) or not raw["sweep"]:
        raise ConfigError(f"{path}: --sweep needs a list `sweep` of merges to compare (docs/merge.md shows one)")
    return {key: value for key, value in raw.items() if key != "sweep"}, raw["sweep"]


def candidates(recipe: Mapping[str, Any], entries: Sequence[Any]) -> list[Candidate]:
    """Return every merge a sweep's entries describe, checked as a merge's configuration is; raises ConfigError."""
    found: dict[str, Candidate] = {}
    for i, entry in enumerate(entries):
        where = f"sweep[{i}]"
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where} must have a `merge_method`, found {entry!r}")
        for key in entry:
            if key not in _ENTRY_KEYS:
                raise ConfigError(f"unknown key in {where}: `{key}`{nearest(str(key), _ENTRY_KEYS)}")
        each = entry.get("each") or {}
        if not isinstance(each, Mapping) or not all(isinstance(values, list) and values for values in each.values()):
            raise ConfigError(f"{where}.each must map parameters to lists of values")
        for values in itertools.product(*each.values()):
            candidate = _candidate(recipe, entry, dict(zip(each, values)), where)
            found[candidate.name] = candidate
    return list(found.values())


def _candidate(recipe: Mapping[str, Any], entry: Mapping[str, Any], chosen: Json, where: str) -> Candidate:
    method = str(entry.get("merge_method", recipe.get("merge_method")))
    if method not in METHODS:
        raise ConfigError(f"{where}: merge_method {method!r} is not known{nearest(method, METHODS)}")
    parameters = {**(entry.get("parameters") or {}), **chosen}
    known = METHODS[method].parameters
    own = {name: value for name, value in parameters.items() if name in known and known[name].per_model}
    shared = {name: value for name, value in parameters.items() if name not in own}
    models: list[Json] = [{"model": m} if isinstance(m, str) else dict(m) for m in recipe.get("models", [])]
    for model in models:
        kept = {k: v for k, v in (model.get("parameters") or {}).items() if k in known and known[k].per_model}
        model["parameters"] = kept | own
    result = {**recipe, "merge_method": method, "models": models, "parameters": shared}
    result.pop("granularity", None)
    parse_merge_config(result, where)
    words = [method, *(f"{name}={value}" for name, value in parameters.items())]
    return Candidate(name=" ".join(words), recipe=result)


def sweep(
    recipe: Mapping[str, Any],
    entries: Sequence[Any],
    out: Path | str,
    validation: Sequence[Dialogue],
    *,
    keep_all: bool = False,
    template: str = "own",
    max_length_tokens: int = 2048,
    dtype: str = "auto",
    batch_tokens: int = 8192,
    place: Mapping[str, Any] | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Json:
    """Merge every candidate in turn, score it in bits per byte on `validation`, and leave the best at `out`.

    Returns the table, also in `out`/sweep.json: per candidate bits per byte and the paired difference to the best, each
    [value, low, high], and the share of each update that survived. While it works, `out` + ".sweep" holds two merged
    models at most, or all of them with `keep_all`, which leaves the others there. Scores are kept as they are found: a
    sweep that was stopped goes on. `validation` should be neither trained nor tested on: the choice fits it.
    `template` names the one its dialogues are written in (fusechat.template); `place` holds `device` and `device_map`
    of the scoring (fusechat.model.load_model).
    `options` are those of `merge`. Raises what `merge` raises, and MismatchError when `out` holds another sweep.
    """
    from fusechat.dialogue import dataset_fingerprint
    from fusechat.evaluate.bpb import score_dialogues

    out = Path(out)
    found = candidates(recipe, entries)
    scoring: Json = {
        "template": template, "max_length_tokens": max_length_tokens, "dtype": dtype, "batch_tokens": batch_tokens
    }  # fmt: skip
    merges = [load_merge_config(candidate.recipe) for candidate in found]
    models = dict.fromkeys(ref for config, _ in merges for ref in (config.base, *(t.ref for t in config.targets)))
    request: Json = {
        "recipes": sha256_json([text for _, text in merges]),
        "models_sha256": {str(ref): open_model(ref).identity()["sha256"] for ref in models},
        "options": {name: options.get(name, default) for name, default in _RESULT_OPTIONS.items()},
        "validation_fingerprint": dataset_fingerprint(validation),
        "scoring": scoring,
    }
    if (out / TABLE).exists():
        table: Json = read_json(out / TABLE)
        if table.get("request") != request:
            what = "; ".join(differences(request, table.get("request") or {}))
            raise MismatchError(f"{out} was chosen from other inputs ({what}): remove it or choose another place")
        return table
    if out.exists() and any(out.iterdir()):
        raise MismatchError(f"{out} exists and is no sweep of ours: choose another place")

    def score(model: Path) -> Scores:
        return score_dialogues(str(model), validation, **scoring, **(place or {}))

    work = Work(folder=out.with_name(out.name + FOLDER_SUFFIX), request=request, keep_all=keep_all)
    for done, candidate in enumerate(found, 1):
        work.try_out(candidate, score, options)
        if progress is not None:
            progress(done, len(found))
    best = work.best
    merge(best.recipe, work.place(best), **options)  # as it is, or again if a kill came between
    table = {
        "format": FORMAT, "version": 1, "best": best.name, "n_dialogues": len(validation),
        **work.table(validation, samples, confidence, seed), "request": request,
    }  # fmt: skip
    write_json(work.place(best) / TABLE, table)
    work.place(best).replace(out)
    if not keep_all:
        shutil.rmtree(work.folder)
    return table


class Work:
    """OUT.sweep: scores of what was tried, and the merged models that are still needed."""

    def __init__(self, folder: Path, request: Json, *, keep_all: bool) -> None:
        self.folder = folder
        self.request = request
        self.keep_all = keep_all
        self.tried: dict[str, tuple[Candidate, Json]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def place(self, candidate: Candidate) -> Path:
        """Return where a candidate is merged."""
        return self.folder / re.sub(r"[^\w.=-]+", "-", candidate.name)

    @property
    def best(self) -> Candidate:
        """The candidate with the fewest bits per byte; the first of equals."""
        return min(self.tried.values(), key=lambda pair: pair[1]["bits_per_byte"])[0]

    def try_out(self, candidate: Candidate, score: Score, options: Json) -> None:
        """Merge and score one candidate unless its score is known, and drop the weights of the loser."""
        import numpy as np

        from fusechat.evaluate.bpb import NATS_PER_BIT

        note = self.place(candidate).with_name(self.place(candidate).name + ".json")
        facts = read_json(note) if note.exists() else {}
        if facts.get("request") != self.request:
            provenance = self._merge(candidate, options)
            scores = score(self.place(candidate))
            known = np.isfinite(scores.nll) & (scores.content_bytes > 0)
            nll, size = scores.nll[known], scores.content_bytes[known]
            facts = {
                "request": self.request,
                "bits_per_byte": float(nll.sum() / NATS_PER_BIT / size.sum()),
                "surviving_share": provenance.get("surviving_share"),
                "nll": scores.nll_json,
                "content_bytes": scores.content_bytes.tolist(),
            }
            write_json(note, facts)
        before = self.best if self.tried else candidate
        self.tried[candidate.name] = (candidate, facts)
        loser = candidate if self.best == before and before != candidate else before
        if loser != self.best and not self.keep_all:
            shutil.rmtree(self.place(loser), ignore_errors=True)

    def _merge(self, candidate: Candidate, options: Json) -> Json:
        """Merge one candidate, anew where its folder holds what was merged of models that have changed since."""
        place = self.place(candidate)
        try:
            return merge(candidate.recipe, place, **options)
        except MismatchError:
            if not (place / PROVENANCE).exists():
                raise
            shutil.rmtree(place)
            return merge(candidate.recipe, place, **options)

    def table(self, validation: Sequence[Dialogue], samples: int, confidence: float, seed: int) -> Json:
        """Return every candidate's bits per byte and paired difference to the best, with bootstrap intervals."""
        from fusechat.evaluate.bpb import Scores, results_table

        scores = {name: Scores.of(facts["nll"], facts["content_bytes"]) for name, (_, facts) in self.tried.items()}
        best = self.best.name
        results = results_table(scores, validation, against=best, samples=samples, confidence=confidence, seed=seed)
        found = results["groups"]["overall"]["models"]
        return {
            "merges": {
                name: {
                    "bits_per_byte": found[name]["bits_per_byte"],
                    "difference_to_best": found[name][f"difference_to_{best}"],
                    "surviving_share": facts["surviving_share"],
                    "recipe": _without_models(candidate.recipe),
                }
                for name, (candidate, facts) in self.tried.items()
            }
        }


def _without_models(recipe: Mapping[str, Any]) -> Json:
    return {key: value for key, value in recipe.items() if key in ("merge_method", "parameters")}
