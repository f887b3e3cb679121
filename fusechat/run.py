"""A whole fusion: extract → align → train → merge → evaluate, each stage skipped when its artefact is there and whole.

out/config.yaml      every setting
out/extract/NAME/    TopKStore of the pivot and of every source
out/align/NAME/      AlignedStore of every source
out/targets/NAME/    one target per source (`multi` when all teach at once), and `sft`, the control
out/merged/          the fused model
out/results.json     held-out bits per byte of all of them
out/scores.json      the same, dialogue by dialogue
out/categories.json  the category of every dialogue that was fused on
out/stages.jsonl     what each stage took
out/report.html      what came out, for people; report.md and report.json beside it
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fusechat.artifact import MANIFEST, Json, atomic_write, read_json, write_json
from fusechat.callable_module import make_callable
from fusechat.config import RunConfig, TrainConfig, load_config, source_name
from fusechat.dialogue import dataset_fingerprint
from fusechat.errors import FormatError, MismatchError
from fusechat.layout import Layout
from fusechat.ledger import Ledger
from fusechat.processes import rank, wait_until
from fusechat.records import Dialogue
from fusechat.reporter import Reporter
from fusechat.split import Split, load_split
from fusechat.store import same_vocabulary

__all__ = ["run"]
make_callable(__name__)

RESULTS_FORMAT = "fusechat.results"
CATEGORIES_FORMAT = "fusechat.categories"
SFT = "sft"
MULTI = "multi"


def run(config: RunConfig | Path | str, overrides: Sequence[str] = (), *, reporter: Reporter | None = None) -> Json:
    """Run or resume a whole fusion and return its results (the content of results.json).

    Under torchrun or accelerate launch all processes train, and the first does the other stages; only it has results.

    Stages whose artefacts are whole and made from the same inputs are skipped; raises MismatchError, naming both sides,
    when they were made from others.
    """
    if not isinstance(config, RunConfig):
        config = load_config(Path(config), overrides)
    layout = Layout(out=Path(config.out))
    layout.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(reporter or Reporter(), layout.ledger)
    report = ledger if rank() == 0 else Reporter()
    split = _load_data(config, report)
    names = [source_name(source) for source in config.sources]
    if rank() == 0:
        _write_config(config, layout)
        _extract_all(config, layout, split.train, report)
        _write_categories(split.train, layout)
        _align_all(config, layout, names, report)
    else:
        # Artefacts that are there from before may be refused by the first process: it then ends this one too.
        stores = [layout.store(name) / MANIFEST for name in ("pivot", *names)]
        wait_until(lambda: all(path.exists() for path in stores))
        wait_until(lambda: all((path / MANIFEST).exists() for path in _taught_by(layout, names)))
    _train_all(config, layout, names, split.validation or split.held_out, report)
    if rank() != 0:
        return {}
    targets = [MULTI] if config.train.mode == "multi" else names
    _merge(config, layout, targets, split.validation, report)
    results = _evaluate(config, layout, targets, split.held_out, report)
    _report(layout, ledger)
    return results


def _load_data(config: RunConfig, report: Reporter) -> Split:
    report.stage("read data", "dialogues")
    split = load_split(config)
    dropped = "".join(f"; dropped: {count} × {reason}" for reason, count in split.loaded.dropped.items())
    chosen_on = f", {len(split.validation):,} to choose on" * bool(split.validation)
    report.done("read data", f"{len(split.train):,} to fuse on{chosen_on}, {len(split.held_out):,} held out{dropped}")
    return split


def _write_config(config: RunConfig, layout: Layout) -> None:
    with atomic_write(layout.config) as partial:
        partial.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False), encoding="utf-8")


def _extract_all(config: RunConfig, layout: Layout, dialogues: list[Dialogue], report: Reporter) -> None:
    from fusechat.extract import extract, left_out
    from fusechat.extract.settings import extract_settings

    models = {"pivot": (config.pivot, extract_settings(config))}
    models |= {source_name(s): (s.model, extract_settings(config, s)) for s in config.sources}
    for name, (model, options) in models.items():
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
    from fusechat.train import train

    stores = dict(zip(names, _taught_by(layout, names)))
    targets = {MULTI: names} if config.train.mode == "multi" else {name: [name] for name in names}
    if config.train.sft_control:
        targets[SFT] = []
    for name, taught_by in targets.items():
        provenance = train(
            config.pivot,
            layout.store("pivot"),
            [stores[source] for source in taught_by],
            layout.target(name),
            target_settings(config, taught_by),
            seed=config.seed,
            held_out=held_out,
            progress=report.stage(f"train {name}", "steps"),
        )
        share = "" if name == SFT else f", source taught in {provenance['source_share']:.0%}"
        report.done(f"train {name}", f"loss {provenance['losses'][-1]:.4f}{share}" if provenance["losses"] else "done")


def target_settings(config: RunConfig, taught_by: Sequence[str]) -> TrainConfig:
    """Return the settings of the target that these sources teach: of the sources' weights, only theirs."""
    weights = {k: w for k, w in config.train.source_weights.items() if k == "pivot" or k in taught_by}
    return config.train.model_copy(update={"source_weights": weights})


def merge_recipe(config: RunConfig, layout: Layout, names: list[str]) -> Json:
    """Return the merge of the run's targets onto the pivot in the YAML form `fusechat merge` reads."""
    weights = config.merge.weights or [1.0] * len(names)
    models = [{"model": str(layout.target(name))} for name in names]
    if config.merge.method == "linear" or names == [MULTI]:
        return {
            "merge_method": "linear",
            "base_model": config.pivot,
            "models": [m | {"parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)],
        }
    return {
        "merge_method": "sce",
        "base_model": config.pivot,
        "models": models,
        "parameters": {"select_topk": config.merge.select_topk, "variant": config.merge.variant},
    }


def _merge(config: RunConfig, layout: Layout, names: list[str], validation: list[Dialogue], report: Reporter) -> None:
    from fusechat.merge import merge

    if config.merge.sweep:
        from fusechat.merge.sweep import sweep

        models = [{"model": str(layout.target(name))} for name in names]
        table = sweep(
            {"base_model": config.pivot, "models": models},
            config.merge.sweep,
            layout.merged,
            validation,
            max_length_tokens=config.extract.max_length_tokens,
            dtype=config.extract.dtype,
            batch_tokens=config.extract.batch_tokens,
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
    from fusechat.checkpoint import checkpoint_sha256, resolve_model
    from fusechat.evaluate.bpb import SCORES_FORMAT, paired_differences, results_table, score_models

    targets = names + [SFT] * config.train.sft_control
    models: dict[str, Any] = {"pivot": config.pivot}
    if config.eval.sources:
        models |= {f"source {source_name(s)}": s.model for s in config.sources}
    models |= {SFT if name == SFT else f"target {name}": layout.target(name) for name in targets}
    models["merged"] = layout.merged
    request = {
        "held_out_fingerprint": dataset_fingerprint(held_out),
        "models": {name: checkpoint_sha256(resolve_model(str(model))) for name, model in models.items()},
        "eval": config.eval.model_dump(exclude={"sources"}),  # `models` says it
        "seed": config.seed,
    }
    if layout.results.exists():
        results = read_json(layout.results)
        if results.get("format") != RESULTS_FORMAT:
            raise FormatError(f"{layout.results} is not a table of results: choose another `out`")
        if results["request"] == request:
            return dict(results)
        raise MismatchError(f"{layout.results} is of other models or dialogues: remove it or choose another `out`")
    scores = score_models(
        models,
        held_out,
        max_length_tokens=config.extract.max_length_tokens,
        dtype=config.extract.dtype,
        batch_tokens=config.extract.batch_tokens,
        progress=report.stage("evaluate", "models"),
    )
    bootstrap: Json = {
        "samples": config.eval.bootstrap_samples, "confidence": config.eval.confidence, "seed": config.seed,
    }  # fmt: skip
    against = SFT if config.train.sft_control else "pivot"
    results = {
        "format": RESULTS_FORMAT,
        "version": 1,
        **results_table(scores, held_out, against=against, **bootstrap),
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
    report.done("evaluate", f"{results['n_dialogues']} held-out dialogues")
    return results


def _report(layout: Layout, report: Ledger) -> None:
    from fusechat.report import report as write_report

    if report.worked or not layout.report.exists():
        report.stage("report", "pages")
        report.done("report", str(write_report(layout.out)))
