"""What a profile says: per operator its share, what it attained of the ceiling, and what to look at next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from fusechat.profile.trace import Operator

_SMALL_CALL_S = 20e-6
_AT_ROOF = 0.7


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One operator: `ceiling` is the share of the lower of the two roofs (copy, product) at its intensity."""

    operator: Operator
    share: float
    gb_s: float | None
    gflop_s: float | None
    ceiling: float | None
    advice: str


def summarise(operators: Sequence[Operator], ceilings: Mapping[str, float], dtype: str, limit: int = 12) -> list[Line]:
    """Return the operators that take most of the time, with the rates they attained.

    `ceilings` are those of fusechat.bench.machine, measured in the same run: copy_gb_s (bytes read and written) and
    gemm_DTYPE_gflop_s.
    """
    total = sum(o.seconds for o in operators) or 1.0
    copy, product = ceilings["copy_gb_s"], ceilings[f"gemm_{'bfloat16' if dtype != 'float32' else dtype}_gflop_s"]
    lines = []
    for operator in operators[:limit]:
        gb_s = operator.n_bytes / operator.seconds / 1e9 if operator.n_bytes else None
        gflop_s = operator.n_flops / operator.seconds / 1e9 if operator.n_flops else None
        ceiling = None
        if gb_s is not None or gflop_s is not None:
            ceiling = max((gb_s or 0.0) / copy, (gflop_s or 0.0) / product)
        lines.append(
            Line(
                operator=operator,
                share=operator.seconds / total,
                gb_s=gb_s,
                gflop_s=gflop_s,
                ceiling=ceiling,
                advice=_advice(operator, gflop_s, product, ceiling),
            )
        )
    return lines


def _advice(operator: Operator, gflop_s: float | None, product: float, ceiling: float | None) -> str:
    if operator.seconds / operator.calls < _SMALL_CALL_S and operator.calls > 100:
        return "small calls: batch"
    if ceiling is None:
        return "no shapes: the trace"
    at_roof = ceiling > _AT_ROOF
    if gflop_s is not None and gflop_s / product >= ceiling:
        return "at roof: fewer FLOPs" if at_roof else "larger shapes"
    return "at roof: fuse" if at_roof else "strides, threads"


def table(lines: Sequence[Line]) -> Table:
    """Return a table within 80 columns."""
    result = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1))
    result.add_column("operator", max_width=30, no_wrap=True, overflow="ellipsis")
    for header in ("time", "calls", "GB/s", "GFLOP/s", "roof"):
        result.add_column(header, justify="right", no_wrap=True)
    result.add_column("next", style="dim", no_wrap=True)
    for line in lines:
        result.add_row(
            line.operator.name,
            f"{line.share:.1%}",
            f"{line.operator.calls}",
            "–" if line.gb_s is None else f"{line.gb_s:.3g}",
            "–" if line.gflop_s is None else f"{line.gflop_s:.3g}",
            "–" if line.ceiling is None else f"{line.ceiling:.0%}",
            line.advice,
        )
    return result
