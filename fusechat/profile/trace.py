"""A Chrome trace of torch.profiler as numbers: per operator its own time, the bytes it must move, its FLOPs."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ITEM_BYTES = {
    "float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "long": 8, "int": 4, "bool": 1,
    "unsigned char": 1, "signed char": 1, "short": 2,
}  # fmt: skip
_FREE = frozenset(
    {
        "_local_scalar_dense", "_unsafe_view", "alias", "as_strided", "chunk", "contiguous", "detach", "einsum",
        "empty", "empty_like", "empty_strided", "expand", "item", "lift_fresh", "linear", "matmul", "narrow", "permute",
        "reshape", "resize_", "scaled_dot_product_attention", "select", "slice", "split", "squeeze", "t", "to",
        "transpose", "unbind", "unsqueeze", "view",
    }
)  # fmt: skip
"""Operators that move nothing themselves: they look at memory differently, ask for it, or call those that do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """All calls of one operator: its own seconds, without what it calls; bytes and FLOPs are counted from the shapes.

    Bytes are each input once, and the output; they are None where no call had shapes.
    """

    name: str
    calls: int
    seconds: float
    n_bytes: float | None
    n_flops: float


def read_operators(trace: Path) -> list[Operator]:
    """Return the operators of a trace by their own time, the longest first: GPU time where there are GPU kernels."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    complete = [e for e in events if e.get("ph") == "X" and "dur" in e]
    operators = [e for e in complete if e.get("cat") in ("cpu_op", "user_annotation")]
    kernels = [e for e in complete if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    own = _device_times(operators, kernels) if kernels else _own_times(operators)
    grouped: dict[str, list[tuple[Mapping[str, Any], float]]] = defaultdict(list)
    for event, microseconds in own:
        grouped[event["name"]].append((event, microseconds))
    found = [_operator(name, calls) for name, calls in grouped.items()]
    return sorted((o for o in found if o.seconds > 0), key=lambda o: -o.seconds)


def memory_timeline(trace: Path) -> list[tuple[float, int]]:
    """Return (seconds from the start, bytes that torch holds) at every allocation and release of a trace."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    found = [
        (float(e["ts"]), int(e["args"]["Total Allocated"]))
        for e in events
        if e.get("name") == "[memory]" and "Total Allocated" in e.get("args", {})
    ]
    found.sort()
    return [((ts - found[0][0]) / 1e6, size) for ts, size in found]


def _own_times(events: Sequence[Mapping[str, Any]]) -> Iterable[tuple[Mapping[str, Any], float]]:
    """Give every event its duration without that of the events inside it, per thread."""
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event.get("tid")].append(event)
    for members in threads.values():
        members.sort(key=lambda e: (e["ts"], -e["dur"]))
        stack: list[list[Any]] = []
        for event in members:
            while stack and event["ts"] >= stack[-1][0]["ts"] + stack[-1][0]["dur"]:
                done, inside = stack.pop()
                yield done, done["dur"] - inside
            if stack:
                stack[-1][1] += event["dur"]
            stack.append([event, 0.0])
        for done, inside in stack:
            yield done, done["dur"] - inside


def _device_times(
    operators: Sequence[Mapping[str, Any]], kernels: Sequence[Mapping[str, Any]]
) -> Iterable[tuple[Mapping[str, Any], float]]:
    """Give every GPU kernel's time to the innermost operator that launched it (they share an `External id`)."""
    launchers = {e["args"]["External id"]: e for e in operators if "External id" in e.get("args", {})}
    for kernel in kernels:
        launcher = launchers.get(kernel.get("args", {}).get("External id"))
        args = {} if launcher is None else launcher["args"]
        yield {"name": kernel["name"].split("<")[0][:60], "args": args}, kernel["dur"]


def _operator(name: str, calls: Sequence[tuple[Mapping[str, Any], float]]) -> Operator:
    counted = [_work(name, event.get("args", {})) for event, _ in calls]
    sizes = [n_bytes for n_bytes, _ in counted if n_bytes is not None]
    return Operator(
        name=name.removeprefix("aten::"),
        calls=len(calls),
        seconds=sum(microseconds for _, microseconds in calls) / 1e6,
        n_bytes=sum(sizes) if sizes else None,
        n_flops=sum(flops for _, flops in counted),
    )


def _work(name: str, args: Mapping[str, Any]) -> tuple[float | None, float]:
    short = name.removeprefix("aten::")
    if short in _FREE:
        return 0.0, 0.0
    dims, types = args.get("Input Dims"), args.get("Input type")
    if not dims or not types:
        return None, 0.0
    tensors = [
        (shape, _ITEM_BYTES[kind])
        for shape, kind in zip(dims, types)
        if kind in _ITEM_BYTES and isinstance(shape, list) and not any(isinstance(n, list) for n in shape) and shape
    ]
    if not tensors:
        return None, 0.0
    read = sum(math.prod(shape) * item for shape, item in tensors)
    product = _product(short, [shape for shape, _ in tensors])
    if product is not None:
        flops, output = product
        return read + output * tensors[-1][1], flops
    largest = max(tensors, key=lambda t: math.prod(t[0]))
    written = math.prod(largest[0]) * largest[1]
    # copy_, add_ and the like have their target among the inputs.
    return read + (0 if short.endswith("_") else written), 0.0


def _product(name: str, shapes: Sequence[Sequence[int]]) -> tuple[float, int] | None:
    """Return FLOPs and output elements of a matrix product or of attention."""
    if name in ("mm", "bmm") and len(shapes) >= 2:
        (*batch, m, k), n = shapes[0], shapes[1][-1]
    elif name in ("addmm", "baddbmm") and len(shapes) >= 3:
        (*batch, m, k), n = shapes[1], shapes[2][-1]
    elif "scaled_dot_product" in name and len(shapes) >= 3 and all(len(shape) == 4 for shape in shapes[:3]):
        # Two products forward; five backward, where the gradient stands before query, key and value.
        backward = "backward" in name
        b, h, s, d = shapes[backward]
        products = 5 if backward else 2
        return products * 2.0 * b * h * s * shapes[1 + backward][2] * d, (3 if backward else 1) * b * h * s * d
    else:
        return None
    count = math.prod(batch)
    return 2.0 * count * m * k * n, count * m * n
