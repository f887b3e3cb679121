"""What a profile says: per operator its share, what it attained of the ceiling, and what to look at next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from fusechat.profile.trace import Operator

OUTSIDE = "outside operators"
"""The time of a stage in which none of torch's operators runs: Python, and the compiled engine that it calls."""

_SMALL_CALL_S = 20e-6
_AT_ROOF = 0.7
_NAME_COLUMNS = 18


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
    if operator.name == OUTSIDE:
        return "functions below"
    # What a call takes at the roof: with less than this, starting it is most of it.
    at_best = operator.seconds * min(ceiling or 1.0, 1.0) / operator.calls
    if operator.calls > 100 and (at_best < _SMALL_CALL_S or operator.n_bytes == 0):
        return "batch calls"
    if ceiling is None:
        return "see the trace"
    at_roof = ceiling > _AT_ROOF
    if gflop_s is not None and gflop_s / product >= ceiling:
        return "fewer FLOPs" if at_roof else "larger shapes"
    return "fuse" if at_roof else "strides, threads"


def table(lines: Sequence[Line]) -> Table:
    """Return a table within 80 columns."""
    result = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1))
    result.add_column("operator", no_wrap=True)
    for header in ("time", "calls", "MB", "GFLOP", "GB/s", "GFLOP/s", "roof"):
        result.add_column(header, justify="right", no_wrap=True)
    result.add_column("next", style="dim", no_wrap=True)
    for line in lines:
        operator = line.operator
        name = operator.name.lstrip("_")
        result.add_row(
            name if len(name) <= _NAME_COLUMNS else name[: _NAME_COLUMNS - 1] + "…",
            f"{line.share:.1%}",
            "–" if operator.name == OUTSIDE else f"{operator.calls}",
            _digits(operator.n_bytes and operator.n_bytes / 1e6),
            _digits(operator.n_flops and operator.n_flops / 1e9),
            _digits(line.gb_s),
            _digits(line.gflop_s),
            "–" if line.ceiling is None else f"{line.ceiling:.0%}",
            line.advice,
        )
    return result


def _digits(value: float | None) -> str:
    """Return a number that is not nothing in at most five columns, three digits of it or more."""
    if not value:
        return "–"
    if value < 0.01:
        return "<0.01"
    if value >= 99_999.5:
        return f"{value / 1e3:.0f}k"
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"[:4]
