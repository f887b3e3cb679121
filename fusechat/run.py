"""A whole fusion: extract → align → train → merge → evaluate, each stage skipped when its artefact is there and whole.

out/config.yaml      every setting
out/extract/NAME/    TopKStore of the pivot and of every source
out/align/NAME/      AlignedStore of every source
out/targets/NAME/    one target per source (`multi` when all teach at once), and `sft`, the control
out/merged/          the fused model
out/results.json     held-out bits per byte of all of them
out/scores.json      the same, dialogue by dialogue; scored.json while they are made
out/not_scored.log   why a source has no score, where one has none
out/categories.json  the category of every dialogue that was fused on
out/stages.jsonl     what each stage took
out/report.html      what came out, for people; report.md and report.json beside it
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusechat.artifact import MANIFEST, Json, atomic_write, locked, read_json, write_json
from fusechat.callable_module import make_callable
from fusechat.config import RunConfig, load_config, source_name
from fusechat.dialogue import dataset_fingerprint
from fusechat.errors import FormatError, MismatchError
from fusechat.layout import MULTI, SFT, Layout
from fusechat.ledger import Ledger
from fusechat.preflight import make_folders, preflight
from fusechat.processes import rank, wait_until
from fusechat.records import Dialogue
from fusechat.reporter import Reporter
from fusechat.split import Split, load_split
from fusechat.store import TOPK_FORMAT, same_vocabulary, store_manifest
from fusechat.template import OWN
from fusechat.train_config import TrainConfig
from fusechat.yaml_file import yaml_text

__all__ = ["run"]
make_callable(__name__)

RESULTS_FORMAT = "fusechat.results"
CATEGORIES_FORMAT = "fusechat.categories"


def run(config: RunConfig | Path | str, overrides: Sequence[str] = (), *, reporter: Reporter | None = None) -> Json:
    """Run or resume a whole fusion and return its results (the content of results.json).

    Under torchrun or accelerate launch all processes train, and the first does the other stages; only it has results.

    What would be refused is refused before the first stage, where no weights are needed to see it. Stages whose
    artefacts are whole and made from the same inputs are skipped; raises MismatchError, naming both sides, when they
    were made from others.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    layout = Layout(out=Path(config.out), stores=None if config.stores is None else Path(config.stores))
    ledger = Ledger(reporter or Reporter(), layout.ledger)
    report = ledger if rank() == 0 else Reporter()
    names = [source_name(source) for source in config.sources]
    targets = target_names(config)
    if config.merge.sweep:
        from fusechat.merge.sweep import candidates

        candidates(_merged_models(config, layout, targets), config.merge.sweep)  # a typo is told now, not after days
    split = _load_data(config, report)
    if rank() != 0:
        return _train_beside(config, layout, names, split, report)
    preflight(config, layout, split, [*targets, *[SFT] * config.train.sft_control])
    make_folders(layout)
    with locked(layout.out):
        made = layout.store("pivot") if layout.stores is None else layout.target(targets[0]).parent
        if not layout.config.exists() or not made.exists():
            _write_config(config, layout)  # nothing is made yet that other settings would be of
        _extract_all(config, layout, split.train, report)
        _write_categories(split.train, layout)
        _align_all(config, layout, names, report)
        _train_all(config, layout, names, split.validation or split.held_out, report)
        _merge(config, layout, targets, split.validation, report)
        results = _evaluate(config, layout, targets, split.held_out, report)
        _write_config(config, layout)  # every stage is of these settings: those that differ change no result
        _report(layout, ledger)
    return results


def _train_beside(config: RunConfig, layout: Layout, names: list[str], split: Split, report: Reporter) -> Json:
    """Train with the first process, once it has made what is taught."""
    # Artefacts that are there from before may be refused by the first process: it then ends this one too.
    stores = [layout.store(name) / MANIFEST for name in ("pivot", *names)]
    wait_until(lambda: all(path.exists() for path in stores))
    wait_until(lambda: all((path / MANIFEST).exists() for path in _taught_by(layout, names)))
    _train_all(config, layout, names, split.validation or split.held_out, report)
    return {}


def _load_data(config: RunConfig, report: Reporter) -> Split:
    report.stage("read data", "dialogues")
    split = load_split(config)
    dropped = "".join(f"; dropped: {count} × {reason}" for reason, count in split.loaded.dropped.items())
    chosen_on = f", {len(split.validation):,} to choose on" * bool(split.validation)
    report.done("read data", f"{len(split.train):,} to fuse on{chosen_on}, {len(split.held_out):,} held out{dropped}")
    return split


def _write_config(config: RunConfig, layout: Layout) -> None:
    with atomic_write(layout.config) as partial:
        partial.write_text(yaml_text(config.model_dump()), encoding="utf-8")


def _extract_all(config: RunConfig, layout: Layout, dialogues: list[Dialogue], report: Reporter) -> None:
    from fusechat.extract import extract, left_out
    from fusechat.extract.settings import models_with_settings

    for name, (model, options) in models_with_settings(config).items():
        manifest = extract(
            model,
            dialogues,
            layout.store(name),
            options,
            seed=config.seed,
            progress=report.stage(f"extract {name}", "tokens"),
        )
        rows = sum(shard["n_rows"] for shard in manifest["shards"])
        report.done(f"extract {name}", f"{rows:,} rows, top {manifest['top_k']}{left_out(manifest)}")


def _write_categories(dialogues: list[Dialogue], layout: Layout) -> None:
    """Keep what the stores do not: the report counts by category."""
    fingerprint = dataset_fingerprint(dialogues)
    if layout.categories.exists() and read_json(layout.categories)["dataset_fingerprint"] == fingerprint:
        return
    names = sorted({dialogue.category for dialogue in dialogues})
    number = {name: i for i, name in enumerate(names)}
    table = {"names": names, "category": [number[dialogue.category] for dialogue in dialogues]}
    write_json(
        layout.categories,
        {"format": CATEGORIES_FORMAT, "version": 1, "dataset_fingerprint": fingerprint, **table},
    )


def _align_all(config: RunConfig, layout: Layout, names: list[str], report: Reporter) -> None:
    from fusechat.align import align

    for name in names:
        if same_vocabulary(layout.store("pivot"), layout.store(name)):
            report.stage(f"align {name}", "rows")
            report.done(f"align {name}", "not needed: its tokens are the pivot's, byte by byte")
            continue
        manifest = align(
            layout.store("pivot"),
            layout.store(name),
            layout.aligned(name),
            **config.align.model_dump(),
            progress=report.stage(f"align {name}", "rows"),
        )
        coverage = manifest["coverage"]["rows"]
        report.done(f"align {name}", ", ".join(f"{kind} {share:.0%}" for kind, share in coverage.items()))


def _taught_by(layout: Layout, names: list[str]) -> list[Path]:
    """Return the store each source teaches from: its own where its vocabulary is the pivot's, else its AlignedStore."""
    pivot = layout.store("pivot")
    return [layout.store(n) if same_vocabulary(pivot, layout.store(n)) else layout.aligned(n) for n in names]


def _train_all(config: RunConfig, layout: Layout, names: list[str], held_out: list[Dialogue], report: Reporter) -> None:
    from fusechat.train import refuse_other_target, train

    stores = dict(zip(names, _taught_by(layout, names)))
    taught_by = {MULTI: names} if config.train.mode == "multi" else {name: [name] for name in names}
    if config.train.sft_control:
        taught_by[SFT] = []
    pivot_store = layout.store("pivot")
    targets = {
        name: ([stores[source] for source in sources], layout.target(name), target_settings(config, sources))
        for name, sources in taught_by.items()
    }
    if rank() == 0:
        for target in targets.values():
            refuse_other_target(pivot_store, *target, seed=config.seed, held_out=held_out)
        if not all(path.exists() for path in (*map(layout.target, targets), layout.merged)):
            _write_config(config, layout)  # what is there is of these settings, and so is what is made from here on
    for name, target in targets.items():
        progress = report.stage(f"train {name}", "steps")
        provenance = train(
            config.pivot, pivot_store, *target, seed=config.seed, held_out=held_out, progress=progress
        )  # fmt: skip
        share = "" if name == SFT else f", source taught in {provenance['source_share']:.0%}"
        report.done(f"train {name}", f"loss {provenance['losses'][-1]:.4f}{share}" if provenance["losses"] else "done")


def target_names(config: RunConfig) -> list[str]:
    """Return the names of the targets that are merged: the sources' own, or of the one that all sources teach."""
    return [MULTI] if config.train.mode == "multi" else [source_name(source) for source in config.sources]


def _merged_models(config: RunConfig, layout: Layout, names: list[str]) -> Json:
    """Return what every merge of a run is of, in mergekit's form."""
    return {"base_model": config.pivot, "models": [{"model": str(layout.target(name))} for name in names]}


def target_settings(config: RunConfig, taught_by: Sequence[str]) -> TrainConfig:
    """Return the settings of the target that these sources teach: of the sources' weights, only theirs."""
    weights = {k: w for k, w in config.train.source_weights.items() if k == "pivot" or k in taught_by}
    return config.train.model_copy(update={"source_weights": weights})


def merge_recipe(config: RunConfig, layout: Layout, names: list[str]) -> Json:
    """Return the merge of the run's targets onto the pivot in the YAML form `fusechat merge` reads."""
    weights = config.merge.weights or [1.0] * len(names)
    common = _merged_models(config, layout, names)
    if config.merge.method == "linear" or names == [MULTI]:
        return {
            "merge_method": "linear",
            **common,
            "models": [m | {"parameters": {"weight": w}} for m, w in zip(common["models"], weights, strict=True)],
        }
    return {
        "merge_method": "sce",
        **common,
        "parameters": {"select_topk": config.merge.select_topk, "variant": config.merge.variant},
    }


def _merge(config: RunConfig, layout: Layout, names: list[str], validation: list[Dialogue], report: Reporter) -> None:
    from fusechat.merge import merge

    if config.merge.sweep:
        from fusechat.evaluate.run_scores import scoring_options
        from fusechat.merge.sweep import sweep

        scoring = scoring_options(config)
        place = {key: scoring.pop(key) for key in ("device", "device_map")}
        table = sweep(
            _merged_models(config, layout, names),
            config.merge.sweep,
            layout.merged,
            validation,
            **scoring,
            place=place,
            samples=config.eval.bootstrap_samples,
            confidence=config.eval.confidence,
            seed=config.seed,
            progress=report.stage("merge", "merges"),
        )
        report.done("merge", f"{table['best']}, best of {len(table['merges'])}")
        return
    recipe = merge_recipe(config, layout, names)
    provenance = merge(recipe, layout.merged, progress=report.stage("merge", "bytes"))
    how = "the one target as it is" if names == [MULTI] else recipe["merge_method"]
    report.done("merge", f"{how}, {provenance['n_tensors']} tensors")


def _evaluate(config: RunConfig, layout: Layout, names: list[str], held_out: list[Dialogue], report: Reporter) -> Json:
    from fusechat.evaluate.bpb import SCORES_FORMAT, paired_differences, results_table
    from fusechat.evaluate.run_scores import models_of, score_run

    targets = {SFT if name == SFT else f"target {name}": name for name in names + [SFT] * config.train.sft_control}
    models, not_scored = models_of(config, layout, targets)
    stores = dict.fromkeys(models, "pivot") | {f"source {name}": name for name in map(source_name, config.sources)}
    others = {
        name: store_manifest(layout.store(stores[name]), TOPK_FORMAT)["template_sha256"]
        for name, one in models.items()
        if one.scoring["template"] != OWN
    }
    request = {
        "held_out_fingerprint": dataset_fingerprint(held_out),
        "models": {name: one.sha256 for name, one in models.items()},
        "eval": config.eval.model_dump(exclude={"sources"}),  # `models` says it
        "seed": config.seed,
        **({"templates": others} if others else {}),
    }
    if layout.results.exists():
        results = read_json(layout.results)
        if results.get("format") != RESULTS_FORMAT:
            raise FormatError(f"{layout.results} is not a table of results: choose another `out`")
        if results["request"] == request:
            layout.scored.unlink(missing_ok=True)  # left by a kill just after the results were written
            return dict(results)
        raise MismatchError(f"{layout.results} is of other models or dialogues: remove it or choose another `out`")
    scores, failed = score_run(
        models, held_out, layout.scored, log_file=layout.not_scored, progress=report.stage("evaluate", "models")
    )
    not_scored |= failed
    bootstrap: Json = {
        "samples": config.eval.bootstrap_samples, "confidence": config.eval.confidence, "seed": config.seed,
    }  # fmt: skip
    against = SFT if config.train.sft_control else "pivot"
    results = {
        "format": RESULTS_FORMAT,
        "version": 1,
        **results_table(scores, held_out, against=against, **bootstrap),
        "not_scored": not_scored,
        "merged_to": paired_differences(scores, of="merged", to=[f"target {name}" for name in names], **bootstrap),
        "request": request,
    }
    kept = {
        "format": SCORES_FORMAT,
        "version": 1,
        "held_out_fingerprint": request["held_out_fingerprint"],
        "categories": [dialogue.category for dialogue in held_out],
        "content_bytes": scores[against].content_bytes.tolist(),
        "nll": {name: one.nll_json for name, one in scores.items()},
    }
    write_json(layout.scores, kept)
    write_json(layout.results, results)
    layout.scored.unlink(missing_ok=True)
    left_out = "".join(f"; {name} is not scored: {why}" for name, why in not_scored.items())
    report.done("evaluate", f"{results['n_dialogues']} held-out dialogues{left_out}")
    return results


def _report(layout: Layout, report: Ledger) -> None:
    from fusechat.report import report as write_report

    if report.worked or not layout.report.exists():
        report.stage("report", "pages")
        report.done("report", str(write_report(layout.out)))
