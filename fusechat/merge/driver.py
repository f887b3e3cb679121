"""The merge of whole models: check everything, then one loop over tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusechat.artifact import Json, require_free_bytes
from fusechat.checkpoint import resolve_model
from fusechat.errors import ConfigError, FusechatError
from fusechat.merge.card import model_card
from fusechat.merge.config import MergeConfig, load_merge_config
from fusechat.merge.estimate import adapter_bytes, estimate, n_seen, n_selections, threads_within
from fusechat.merge.inputs import Handles, Model, TensorPlan, match_tensors, open_models
from fusechat.merge.layout import MAX_SHARD_BYTES, Shard, lay_out
from fusechat.merge.lineage import check_lineage, tokens_that_differ
from fusechat.merge.output import FORMAT, Workplace, existing, taken_over
from fusechat.merge.settings import layer_of
from fusechat.merge.tensor import Device, Job, measure_energy, merge_one

Progress = Callable[[int, int], None]
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FEW_SURVIVE = 0.5


def merge(
    config: Mapping[str, Any] | Path | str,
    out: Path | str,
    *,
    threads: int | None = None,
    max_memory_bytes: int | None = None,
    dry_run: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    allow_nonfinite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    ray: str | None = None,
    device: Device = "cpu",
) -> Json:
    """Merge models into the Hugging Face directory `out` and return its provenance (or, dry, what it would need).

    `config` is mergekit's YAML form, as a mapping or a file. All headers, shapes, parameters and the free disk are
    checked before the first byte is written. `out` appears whole or not at all; a merge that was killed leaves
    `out` + ".partial", which the same merge continues with an identical result; one of other inputs is begun anew or,
    with `resume`, refused. The bytes do not depend on `threads` or `max_memory_bytes`. A finished merge of the same
    inputs is returned as it is. `progress(done_bytes, all_bytes)` counts input bytes. `allow_nonfinite` keeps the
    base's value where any input is NaN or infinite; `linear` and `slerp`, which have no base, and rows the base lacks
    are zero there. `ray` is the address of a Ray cluster on the same file system ("local": one started here) that
    merges the shards as tasks. `device` "cuda" merges SCE in blocks on a GPU; the CPU's bytes but for η's last bit.

    Raises ConfigError, DataError (models that do not fit, NaN), FormatError (corrupt files), MismatchError (`out` holds
    something else) and FusechatError (disk).
    """
    out = Path(out)
    parsed, recipe = load_merge_config(config)
    if device == "cuda":
        _check_gpu(parsed, ray)
    with ExitStack() as stack:
        base, targets = open_models(parsed.base, [target.ref for target in parsed.targets])
        check_lineage(targets)
        plans = match_tensors(base, targets, parsed.out_dtype, parsed.vocab)
        _check_parameters(parsed, plans)
        tokenizer = base.checkpoint.directory
        if parsed.tokenizer is not None and parsed.tokenizer != "base":
            tokenizer = resolve_model(parsed.tokenizer, weights=False)
        mixed = tokens_that_differ(
            base, [(str(model.ref), model.checkpoint.directory) for model in targets] + [(str(tokenizer), tokenizer)]
        )
        if mixed and parsed.tokenizer:
            raise ConfigError(
                f"{mixed}: rows are merged by number here, not by token; leave the tokenizer out if meant so"
            )
        request = _request(parsed, base, targets, allow_nonfinite, max_shard_bytes, device)
        shards = lay_out(plans, max_shard_bytes)
        job = Job(
            config=parsed, base=base, targets=targets, handles=Handles(stack), n_layers=_count_layers(plans),
            threads=threads_within(
                max_memory_bytes, threads or len(os.sched_getaffinity(0)), n_seen(parsed), n_selections(parsed),
                adapter_bytes([base, *targets]),
            ),
            allow_nonfinite=allow_nonfinite, unit_weights={}, device=device,
        )  # fmt: skip
        if dry_run:
            return estimate(job, shards, plans)
        finished = existing(out, request)
        if finished is not None:
            return finished
        workplace = stack.enter_context(closing(Workplace(out, request, shards)))
        try:
            finished = workplace.begin(resume=resume)
            if finished is not None:  # by another process, since the first look
                return finished
            needed = {path.name: path.stat().st_size for path in taken_over(base.checkpoint.directory, tokenizer)}
            needed |= {shard.name: shard.size_bytes for shard in shards}
            held = sum(path.stat().st_size for path in workplace.directory.iterdir() if path.name in needed)
            require_free_bytes(out.absolute().parent, sum(needed.values()) - held)
            _write(job, workplace, shards, plans, progress, ray)
            summary = summarise(parsed, workplace.finished, plans)
            if mixed:
                summary["warnings"].append(f"{mixed}: rows of different tokens were merged")
            facts = {
                "base": str(parsed.base),
                "targets": [str(target.ref) for target in parsed.targets],
                "method": parsed.method_name,
                "n_tensors": len(plans),
                "n_elements": sum(plan.n for plan in plans),
                **summary,
            }
            card = model_card(parsed, recipe, summary)
            workplace.take_over(base.checkpoint.directory, tokenizer, parsed.chat_template)
            return workplace.finish(_config_json(base, plans, parsed), recipe, card, facts)
        except (RuntimeError, OSError) as error:
            if isinstance(error, FusechatError):
                raise
            raise FusechatError(
                f"merging into {workplace.directory} failed: {error}; the same merge, run again, goes on there"
            ) from error


def _write(
    job: Job,
    workplace: Workplace,
    shards: Sequence[Shard],
    plans: Sequence[TensorPlan],
    progress: Progress | None,
    ray: str | None,
) -> None:
    total = sum(_input_bytes(plan) for plan in plans)
    done = 0

    def advance(*finished: TensorPlan) -> None:
        nonlocal done
        done += sum(_input_bytes(plan) for plan in finished)
        if progress is not None:
            progress(done, total)

    def prepared() -> Job:
        return _with_unit_weights(job, plans)

    if ray is not None:
        from fusechat.merge.on_ray import write_on_ray

        write_on_ray(job, prepared, workplace, shards, ray, lambda shard: advance(*(slot.plan for slot in shard.slots)))
        return
    ready = prepared()
    ahead = iter([slot.plan for shard in shards for slot in shard.slots][1:])
    for shard in shards:
        fd = workplace.open_shard(shard)
        try:
            for slot in shard.slots:
                following = next(ahead, None)
                if following is not None and ready.handles is not None:
                    ready.handles.read_ahead([following.base, *following.targets])
                if slot.plan.name not in workplace.finished:
                    workplace.note(slot.plan.name, merge_one(ready, slot.plan, fd, slot.offset))
                advance(slot.plan)
            os.fsync(fd)
        finally:
            os.close(fd)


def _input_bytes(plan: TensorPlan) -> int:
    return sum(entry.size_bytes for entry in (plan.base, *plan.targets))


def _with_unit_weights(job: Job, plans: Sequence[TensorPlan]) -> Job:
    """VaRM over layers or the whole model: the weights of a unit need every tensor of it first."""
    granularity = job.config.parameters.get("granularity")
    chosen = granularity.resolve("", 0.0) if granularity else "matrix"
    if chosen not in ("layer", "model"):
        return job
    energies: dict[Any, list[float]] = {}
    units: dict[str, Any] = {}
    for plan in plans:
        if plan.copy:
            continue
        layer = layer_of(plan.name)
        # What belongs to no layer (embeddings, head) is a unit of its own.
        unit = "model" if chosen == "model" else plan.name if layer is None else layer
        units[plan.name] = unit
        found = measure_energy(job, plan)
        energies[unit] = [a + b for a, b in zip(energies.get(unit, [0.0] * len(found)), found)]
    weights = {}
    for name, unit in units.items():
        total = sum(energies[unit])
        weights[name] = [e / total if total else 1 / len(energies[unit]) for e in energies[unit]]
    return replace(job, unit_weights=weights)


def _check_parameters(config: MergeConfig, plans: Sequence[TensorPlan]) -> None:
    for pattern in config.filters():
        if not any(pattern in plan.name for plan in plans):
            raise ConfigError(f"the filter {pattern!r} occurs in no tensor's name, for example not in {plans[0].name}")
    n_layers = _count_layers(plans)
    if config.n_layers not in (None, n_layers):
        raise ConfigError(
            f"slices[0]: layer_range ends at {config.n_layers}, the models have {n_layers} layers: only whole models "
            f"are merged, write [0, {n_layers}]"
        )
    for plan in plans:
        if not plan.copy:
            config.method.options(config.values_for(plan.name, plan.n, n_layers))


def _count_layers(plans: Sequence[TensorPlan]) -> int:
    return 1 + max((layer for plan in plans if (layer := layer_of(plan.name)) is not None), default=-1)


def _check_gpu(config: MergeConfig, ray: str | None) -> None:
    if config.method_name != "sce":
        raise ConfigError(f"--device cuda merges sce only, not {config.method_name}: leave the option out")
    if any(ref.adapter for ref in (config.base, *(target.ref for target in config.targets))):
        raise ConfigError("--device cuda does not stream adapters: leave the option out")
    if ray is not None:
        raise ConfigError("--device cuda and --ray exclude each other: leave one out")
    from fusechat.gpu_merge import require_gpu

    require_gpu()


def _request(
    config: MergeConfig,
    base: Model,
    targets: Sequence[Model],
    allow_nonfinite: bool,
    max_shard_bytes: int,
    device: Device,
) -> Json:
    """What the result depends on: parameters, and inputs recognised by header, size and time, not by place."""

    def plain(parameters: Mapping[str, Any]) -> Json:
        return {
            name: [[rule.pattern, list(rule.values)] for rule in setting.rules] for name, setting in parameters.items()
        }

    return {
        "format": FORMAT, "version": 1, "merge_method": config.method_name, "parameters": plain(config.parameters),
        "targets_parameters": [plain(target.parameters) for target in config.targets],
        "out_dtype": config.out_dtype, "vocab": config.vocab, "tokenizer": config.tokenizer or "base",
        "seed": config.seed, "allow_nonfinite": allow_nonfinite, "max_shard_bytes": max_shard_bytes, "device": device,
        "base_sha256": base.identity()["sha256"], "targets_sha256": [model.identity()["sha256"] for model in targets],
    } | ({} if config.chat_template is None else {"chat_template": config.chat_template})  # fmt: skip


def summarise(config: MergeConfig, statistics: Mapping[str, Json], plans: Sequence[TensorPlan]) -> Json:
    """Return the model's numbers from its tensors': the share of every target's update (Σδ²) that survives."""
    kept = [0.0] * len(config.targets)
    total = [0.0] * len(config.targets)
    weights = [0.0] * len(config.targets)
    n_weighted = 0
    for plan in plans:
        stats = statistics[plan.name]
        if "surviving_share" not in stats:
            continue
        n_weighted += plan.n
        for j, (share, energy, weight) in enumerate(
            zip(stats["surviving_share"], stats["measured_energy"], stats["weights"])
        ):
            kept[j] += share * energy
            total[j] += energy
            weights[j] += weight * plan.n
    if not n_weighted:
        return {"warnings": []}
    shares = [k / t if t else 1.0 for k, t in zip(kept, total)]
    warnings = [
        f"only {share:.0%} of the update of {target.ref} survives: if its gain was large, raise select_topk or density"
        for share, target in zip(shares, config.targets)
        if share < _FEW_SURVIVE
    ]
    return {"surviving_share": shares, "mean_weight": [w / n_weighted for w in weights], "warnings": warnings}


def _config_json(base: Model, plans: Sequence[TensorPlan], config: MergeConfig) -> Json:
    """Return the base's config with the dtype and vocabulary of what was written."""
    result = dict(base.checkpoint.config)
    dtypes = {plan.dtype for plan in plans if not plan.copy}
    if config.out_dtype is not None and len(dtypes) == 1:
        key = "torch_dtype" if "torch_dtype" in result and "dtype" not in result else "dtype"
        result[key] = _DTYPE_NAMES[dtypes.pop()]
    grown = {plan.shape[0] for plan in plans if plan.extras}
    if grown:
        holder = result if "vocab_size" in result else result["text_config"]
        holder["vocab_size"] = max(grown)
    return result
