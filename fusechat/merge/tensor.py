"""One tensor's merge: parameters to engine calls, and what the engine found to numbers a reader can use."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NoReturn

from fusechat.artifact import Json
from fusechat.checkpoint import ITEM_BYTES, TensorEntry
from fusechat.errors import DataError, FormatError
from fusechat.merge.config import MergeConfig
from fusechat.merge.inputs import Extra, Handles, Model, TensorPlan, engine_source, zeros_source
from fusechat.merge.native import _native

Device = Literal["cpu", "cuda"]
Engine = Callable[..., Json]
Origin = tuple[Model, TensorEntry]
COPY_BYTES = 1 << 20  # of a buffer at a time: one read gives 2 GiB at most


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Items [begin, end) of a tensor, and where each of the engine's sources comes from; None stands for zeros."""

    begin: int
    end: int
    origins: Sequence[Origin | None]

    @property
    def n(self) -> int:
        """The number of items."""
        return self.end - self.begin


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
    for extra in plan.extras:
        _merge_extra(job, plan, extra, out_fd, out_offset)
    if checksum is None or plan.extras:
        checksum = _native.tensor_checksum(out_fd, out_offset, math.prod(plan.shape), ITEM_BYTES[plan.dtype])
    return stats | {"xxh64": f"{checksum:016x}"}


def _merge_rows(job: Job, plan: TensorPlan, out_fd: int, out_offset: int) -> tuple[Json, int | None]:
    config = job.config
    values = config.values_for(plan.name, plan.n, job.n_layers)
    options = config.method.options(values)
    if config.method_name == "slerp":
        options["weights"] = _slerp_weights(job, plan, options["weights"][1])
    elif plan.name in job.unit_weights:
        options |= {"weights": list(job.unit_weights[plan.name]), "energy_weights": False}
    spans = [_differences(job, plan)] if config.method.from_base else _spans(job, plan)
    for span in spans:
        report = _merge_span(job, plan, span, out_fd, out_offset, _engine(job), **options)
    return _statistics(job, plan, report), report.get("checksum") if len(spans) == 1 else None


def _differences(job: Job, plan: TensorPlan) -> Span:
    """The whole tensor as the base and the targets; the engine takes rows that a target lacks from the base."""
    origins = [(job.base, plan.base), *zip(job.targets, plan.targets)]
    return Span(begin=0, end=plan.n, origins=origins)


def _spans(job: Job, plan: TensorPlan) -> list[Span]:
    """The tensor for methods that see the models themselves: rows that a target lacks are the base's."""
    models = list(zip(job.targets, plan.targets))
    if job.config.method_name == "slerp":
        models.insert(0, (job.base, plan.base))
    ends = sorted({plan.n, *(entry.n_elements for _, entry in models if entry.n_elements < plan.n)})
    return [
        Span(
            begin=begin,
            end=end,
            origins=[None, *((job.base, plan.base) if entry.n_elements < end else (m, entry) for m, entry in models)],
        )
        for begin, end in pairwise([0, *ends])
    ]


def _merge_extra(job: Job, plan: TensorPlan, extra: Extra, out_fd: int, out_offset: int) -> None:
    """Write rows the base lacks: the plain mean of the targets that have them."""
    origins = [None, *((job.targets[j], plan.targets[j]) for j in extra.targets)]
    span = Span(begin=extra.begin, end=extra.end, origins=origins)
    weights = [1 / len(extra.targets)] * len(extra.targets)
    _merge_span(job, plan, span, out_fd, out_offset, _native.merge_tensor, weights=weights)


def _merge_span(
    job: Job, plan: TensorPlan, span: Span, out_fd: int, out_offset: int, engine: Engine, **options: Any
) -> Json:
    """Merge a span of a tensor whose first item lies at `out_offset`; returns the engine's report."""
    report = engine(
        _sources(job, span), span.n, **options, allow_nonfinite=job.allow_nonfinite, out_dtype=plan.dtype,
        out_fd=out_fd, out_offset=out_offset + span.begin * ITEM_BYTES[plan.dtype], threads=job.threads,
    )  # fmt: skip
    _refuse_nonfinite(job, plan, span, report["nonfinite"])
    if report["n_overflow"]:
        count = report["n_overflow"]
        raise DataError(f"tensor {plan.name}: {count} merged values exceed {plan.dtype}: set out_dtype: float32")
    return report


def _sources(job: Job, span: Span) -> list[tuple[Any, ...]]:
    handles = _handles(job)
    return [
        engine_source(*origin, handles, span.begin, span.n) if origin else zeros_source(span.n)
        for origin in span.origins
    ]


def _engine(job: Job) -> Engine:
    if job.device == "cuda":
        from fusechat import gpu_merge

        return gpu_merge.merge_tensor
    return _native.merge_tensor


def _copy(job: Job, plan: TensorPlan, out_fd: int, out_offset: int) -> Json:
    """Copy a tensor that is no float piece by piece, if all models have the same."""
    for model, entry in zip(job.targets, plan.targets):
        if (entry.dtype, entry.shape) != (plan.base.dtype, plan.base.shape):
            _refuse_difference(plan, model)
    for at in range(0, plan.base.size_bytes, COPY_BYTES):
        n = min(COPY_BYTES, plan.base.size_bytes - at)
        ours = _read(job, plan.base, at, n)
        for model, entry in zip(job.targets, plan.targets):
            if _read(job, entry, at, n) != ours:
                _refuse_difference(plan, model)
        written = os.pwrite(out_fd, ours, out_offset + at)
        if written != n:
            raise OSError(f"only {written} of {n} bytes of {plan.name} could be written")
    return {"copied": plan.base.dtype}


def _read(job: Job, entry: TensorEntry, at: int, n: int) -> bytes:
    data = os.pread(_handles(job).fd(entry.file), n, entry.begin + at)
    if len(data) != n:
        raise FormatError(f"{entry.file} changed while it was read: tensor {entry.name!r} is cut short")
    return data


def _refuse_difference(plan: TensorPlan, model: Model) -> NoReturn:
    raise DataError(
        f"tensor {plan.name} ({plan.base.dtype}) cannot be merged and differs between {model.ref} and the base"
    )


def _refuse_nonfinite(job: Job, plan: TensorPlan, span: Span, nonfinite: Sequence[tuple[int, int]]) -> None:
    """Raise DataError naming the first model, file, tensor and element that is NaN or infinite, unless allowed."""
    if job.allow_nonfinite:
        return
    keeps_base = job.config.method.from_base and span.origins[0] is not None
    kept = "keep the base's values" if keeps_base else "write zeros"
    for origin, (count, first) in zip(span.origins, nonfinite):
        if origin and count:
            model, entry = origin
            place = _index_of(span.begin + first, plan.shape)
            raise DataError(
                f"{entry.file}: tensor {plan.name} of {model.ref} has {count} values that are NaN or infinite, the "
                f"first at {place}: mend the model, or pass --allow-nonfinite to {kept} there"
            )


def _index_of(flat: int, shape: Sequence[int]) -> list[int]:
    index = []
    for size in reversed(shape):
        flat, last = divmod(flat, size)
        index.append(last)
    return index[::-1]


def _slerp_weights(job: Job, plan: TensorPlan, t: float) -> list[float]:
    moments = _measure(job, plan)
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
    return list(_measure(job, plan)["energy"])


def _measure(job: Job, plan: TensorPlan) -> Json:
    span = _differences(job, plan)
    moments = _native.measure_tensor(_sources(job, span), span.n, threads=job.threads)
    _refuse_nonfinite(job, plan, span, moments["nonfinite"])
    return moments


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
