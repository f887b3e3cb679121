"""The roofline: what every measured kernel attains, against the copy and product ceilings of the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusechat.bench.machine import machine_name
from fusechat.errors import DataError


def plot_roofline(result: Mapping[str, Any], out: Path) -> list[Path]:
    """Write `out` as PNG and SVG: GFLOP/s over FLOPs per byte, and every kernel's share of the copy ceiling.

    Raises DataError when no claim of the result has counted bytes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [claim for claim in result["claims"] if claim.get("work")]
    if not points:
        raise DataError("no claim of this result counts its bytes: nothing to draw")
    found = result["ceilings"]
    figure, (roof, bars) = plt.subplots(1, 2, figsize=(11, 0.4 * max(9, len(points))), layout="constrained")
    computing = [claim for claim in points if claim["work"]["n_flops"]]
    intensities = [claim["work"]["n_flops"] / claim["work"]["n_bytes"] for claim in computing]
    low, high = min([0.1, *intensities]) / 2, max([100.0, *intensities]) * 2
    for dtype, style in (("float32", "-"), ("bfloat16", "--")):
        peak = found[f"gemm_{dtype}_gflop_s"]
        ridge = peak / found["copy_gb_s"]
        roof.plot([low, ridge, high], [low * found["copy_gb_s"], peak, peak], style, color="0.3", label=f"{dtype} roof")
    for claim, intensity in zip(computing, intensities):
        attained = claim["work"]["n_flops"] / claim["work"]["seconds"] / 1e9
        roof.plot(intensity, attained, "o", label=claim["name"])
    roof.set(
        xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="GFLOP/s", title=machine_name(result["environment"])
    )
    roof.legend(fontsize="x-small", loc="lower right")
    names = [claim["name"] for claim in points][::-1]
    shares = [claim["work"]["n_bytes"] / claim["work"]["seconds"] / 1e9 / found["copy_gb_s"] for claim in points][::-1]
    bars.barh(range(len(names)), shares, color="#0072b2")
    bars.set_yticks(range(len(names)), names, fontsize="x-small")
    bars.axvline(1, color="0.3")
    bars.set(
        xlabel=f"share of the copy ceiling, {found['copy_gb_s']:.1f} GB/s", title="Bytes that must move, over time"
    )
    paths = [out.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths
