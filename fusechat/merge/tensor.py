"""One tensor's merge: parameters to engine calls, and what the engine found to numbers a reader can use."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fusechat.artifact import Json
from fusechat.checkpoint import ITEM_BYTES
from fusechat.errors import DataError
from fusechat.merge.config import MergeConfig
from fusechat.merge.inputs import Extra, Handles, Model, TensorPlan, engine_source, zeros_source
from fusechat.merge.native import _native

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything a tensor's merge needs besides the tensor."""

    config: MergeConfig
    base: Model
    targets: Sequence[Model]
    handles: Handles | None  # None while a job travels to another process
    n_layers: int
    threads: int
    allow_nonfinite: bool
    unit_weights: Mapping[str, Sequence[float]]  # VaRM over layers or the model: weights by tensor
    device: Device = "cpu"


def _handles(job: Job) -> Handles:
    assert job.handles is not None
    return job.handles


def merge_one(job: Job, plan: TensorPlan, out_fd: int, out_offset: int) -> Json:
    """Merge one tensor into `out_fd` at `out_offset` and return its statistics and its checksum, `xxh64`.

    Raises DataError for NaN or infinity (naming file, tensor and element), for values the output's dtype cannot hold,
    and for integer tensors that differ.
    """
    if plan.copy:
        stats, checksum = _copy(job, plan, out_fd, out_offset), None
    else:
        stats, checksum = _merge_rows(job, plan, out_fd, out_offset)
    item = ITEM_BYTES[plan.dtype]
    for extra in plan.extras:
        _merge_extra(job, plan, extra, out_fd, out_offset + extra.begin * item)
    if checksum is None or plan.extras:
        checksum = _native.tensor_checksum(out_fd, out_offset, math.prod(plan.shape), item)
    return stats | {"xxh64": f"{checksum:016x}"}


def sources(job: Job, plan: TensorPlan, *, with_base: bool) -> list[tuple[Any, ...]]:
    """Return the engine's sources of a tensor: the base (or zeros), then the targets, over the base's elements."""
    base = engine_source(plan.base, _handles(job), plan.n, job.base.low_rank(plan.base.name))
    found = [base if with_base else zeros_source(plan.n)]
    for model, entry in zip(job.targets, plan.targets):
        found.append(engine_source(entry, _handles(job), plan.n, model.low_rank(entry.name)))
    return found


def _merge_rows(job: Job, plan: TensorPlan, out_fd: int, out_offset: int) -> tuple[Json, int | None]:
    config = job.config
    values = config.values_for(plan.name, plan.n, job.n_layers)
    options = config.method.options(values)
    inputs = sources(job, plan, with_base=config.method.from_base)
    if config.method_name == "slerp":
        inputs.insert(1, sources(job, plan, with_base=True)[0])
        options["weights"] = _slerp_weights(job, plan, options["weights"][1])
    elif plan.name in job.unit_weights:
        options |= {"weights": list(job.unit_weights[plan.name]), "energy_weights": False}
    report = _engine(job)(
        inputs, plan.n, **options, allow_nonfinite=job.allow_nonfinite, out_dtype=plan.dtype, out_fd=out_fd,
        out_offset=out_offset, threads=job.threads,
    )  # fmt: skip
    refuse_nonfinite(job, plan, report["nonfinite"], with_base=config.method_name == "slerp")
    if report["n_overflow"]:
        count = report["n_overflow"]
        raise DataError(f"tensor {plan.name}: {count} merged values exceed {plan.dtype}: set out_dtype: float32")
    return _statistics(job, plan, report), report.get("checksum")


def _engine(job: Job) -> Callable[..., Json]:
    if job.device == "cuda":
        from fusechat import gpu_merge

        return gpu_merge.merge_tensor
    return _native.merge_tensor


def _merge_extra(job: Job, plan: TensorPlan, extra: Extra, out_fd: int, out_offset: int) -> None:
    """Write rows the base lacks: the plain mean of the targets that have them."""
    n = extra.end - extra.begin
    inputs = [zeros_source(n)]
    inputs += [engine_source(plan.targets[j], _handles(job), n, None, extra.begin) for j in extra.targets]
    report = _native.merge_tensor(
        inputs, n, weights=[1 / len(extra.targets)] * len(extra.targets), allow_nonfinite=job.allow_nonfinite,
        out_dtype=plan.dtype, out_fd=out_fd, out_offset=out_offset, threads=job.threads,
    )  # fmt: skip
    if not report["written"]:
        raise DataError(f"tensor {plan.name} holds NaN or infinity in rows beyond the base's vocabulary")


def _copy(job: Job, plan: TensorPlan, out_fd: int, out_offset: int) -> Json:
    ours = os.pread(_handles(job).fd(plan.base.file), plan.base.size_bytes, plan.base.begin)
    for model, entry in zip(job.targets, plan.targets):
        if (
            entry.dtype != plan.base.dtype
            or os.pread(_handles(job).fd(entry.file), entry.size_bytes, entry.begin) != ours
        ):
            raise DataError(
                f"tensor {plan.name} ({plan.base.dtype}) cannot be merged and differs between {model.ref} and the base"
            )
    os.pwrite(out_fd, ours, out_offset)
    return {"copied": plan.base.dtype}


def refuse_nonfinite(
    job: Job, plan: TensorPlan, nonfinite: Sequence[tuple[int, int]], *, with_base: bool = False
) -> None:
    """Raise DataError naming the first model, file, tensor and element that is NaN or infinite, unless allowed."""
    if job.allow_nonfinite:
        return
    models = [job.base, *([job.base] if with_base else []), *job.targets]
    entries = [plan.base, *([plan.base] if with_base else []), *plan.targets]
    for model, entry, (count, first) in zip(models, entries, nonfinite):
        if count:
            place = _index_of(first, plan.base.shape)
            raise DataError(
                f"{entry.file}: tensor {plan.name} of {model.ref} has {count} values that are NaN or infinite, the "
                f"first at {place}: mend the model, or pass --allow-nonfinite to keep the base's values there"
            )


def _index_of(flat: int, shape: Sequence[int]) -> list[int]:
    index = []
    for size in reversed(shape):
        flat, last = divmod(flat, size)
        index.append(last)
    return index[::-1]


def _slerp_weights(job: Job, plan: TensorPlan, t: float) -> list[float]:
    moments = _native.measure_tensor(sources(job, plan, with_base=True), plan.n, threads=job.threads)
    refuse_nonfinite(job, plan, moments["nonfinite"])
    first = moments["base_energy"]
    second = first + 2 * moments["dot"][0] + moments["energy"][0]
    lengths = [math.sqrt(max(x, 0.0)) for x in (first, second)]
    scale = math.prod(length if length > 1e-8 else 1.0 for length in lengths)
    cosine = max(-1.0, min(1.0, (first + moments["dot"][0]) / scale))
    if abs(cosine) > 0.9995:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def measure_energy(job: Job, plan: TensorPlan) -> list[float]:
    """Return Σ δ² of one tensor per target."""
    moments = _native.measure_tensor(sources(job, plan, with_base=True), plan.n, threads=job.threads)
    refuse_nonfinite(job, plan, moments["nonfinite"])
    return list(moments["energy"])


def _statistics(job: Job, plan: TensorPlan, report: Json) -> Json:
    """Return a tensor's numbers; shares of Σ δ² are measured on every sixteenth block of a large tensor."""
    if not job.config.method.from_base:
        return {"weights": report["weights"]}
    n_targets = len(job.targets)
    stats: Json = {
        "weights": report["weights"],
        "update_norm": math.sqrt(report["update_energy"]),
        "touched_share": report["n_touched"] / max(plan.n, 1),
        "sign_conflict_rate": report["n_conflicts"] / max(report["n_touched"], 1),
        "surviving_share": [k / e if e else 1.0 for k, e in zip(report["kept_energy"], report["energy"])],
        "measured_energy": report["energy"],
    }
    selections = report["selections"]
    if len(selections) == 1 and selections[0]["k"] < plan.n:
        stats |= {"k": selections[0]["k"], "n_nonzero": selections[0]["n_nonzero"]}
        if selections[0]["k"]:
            stats["threshold"] = (
                selections[0]["threshold"] / n_targets**2
            )  # the engine's keys are J² times the variance
    elif len(selections) == n_targets > 1:
        stats["k"] = [selection["k"] for selection in selections]
        stats["threshold"] = [s["threshold"] if s["k"] else None for s in selections]
    return stats
