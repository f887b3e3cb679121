"""Every kernel and configuration the tests hold to its machine code; `fusechat profile kernels` prints them."""

from __future__ import annotations

from dataclasses import dataclass

from fusechat.kernels import scale, sce, sparse_soft_ce
from fusechat.profile.compiled import Resources, compile_kernel, occupancy

NVIDIA = (80, 90, 100)
AMD = "gfx942"


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One specialisation of the loss kernel."""

    name: str
    dtype: str = "bf16"
    divergence: str = "ce"
    missing: str = "tail"
    n_entries: int = 16
    vocabulary: int = 128_256
    extras: bool = False
    """Temperatures, softcap and label smoothing."""

    ranges: bool = False
    """The launch for rows with ranges, and not the one for the others."""

    def block_and_warps(self, target: int | str) -> tuple[int, int]:
        """Return the columns of one block, and the warps that work on it."""
        wants_registers = self.n_entries > 64 or self.extras or self.missing == "uniform" or self.ranges
        block, warps = sparse_soft_ce.block_and_warps(
            self.vocabulary,
            4 if self.dtype == "fp32" else 2,
            wants_registers=wants_registers or isinstance(target, str),
        )
        return int(block), int(warps)


VARIANTS = (
    Variant(name="ce, K ≤ 16"),
    Variant(name="ce, K ≤ 128", n_entries=128),
    Variant(name="plain cross-entropy", n_entries=0),
    Variant(name="jsd", divergence="jsd"),
    Variant(name="reverse_kl", divergence="reverse_kl"),
    Variant(name="float32", dtype="fp32"),
    Variant(name="V = 32,000", vocabulary=32_000),
    Variant(name="uniform, temperatures, softcap, smoothing", missing="uniform", extras=True),
    Variant(name="rows with ranges, K ≤ 16", ranges=True),
)


def compile_variant(variant: Variant, target: int | str, aligned: bool = True) -> Resources:
    """Compile one variant for an NVIDIA architecture (80, 90, …) or an AMD one (gfx942)."""
    block, warps = variant.block_and_warps(target)
    constants = {
        "DIVERGENCE": variant.divergence, "MISSING": variant.missing, "TEMPERED": variant.extras,
        "TAU": variant.extras, "CAP": variant.extras, "SUMS": variant.extras or variant.missing == "uniform",
        "GRAD": True, "INPLACE": True, "SELECT": variant.ranges, "RANGES": variant.ranges,
        "KB": variant.n_entries, "BLOCK": block,
    }  # fmt: skip
    kernel = sparse_soft_ce._sparse_soft_ce
    signature = dict.fromkeys(kernel.arg_names, "fp32") | dict.fromkeys(("Z", "G", "SAVED"), f"*{variant.dtype}")
    signature |= dict.fromkeys(("LABELS", "IDS"), "*i64") | dict.fromkeys(("PARTITION", "CORRECT", "HAS_RANGES"), "*i1")
    signature |= {"z_stride": "i64", "g_stride": "i64", "N": "i32", "V": "i32", "K": "i32"}
    signature |= dict.fromkeys(("ORDER", "LOW", "HIGH"), "*i32")
    signature |= dict.fromkeys(("LOGPROBS", "HARD_WEIGHT", "ROW_SCALE", "LOSS", "HARD", "SOFT", "LSE"), "*fp32")
    return compile_kernel(
        kernel,
        signature,
        constants,
        target=target,
        warps=warps,
        aligned=["Z", "G", "z_stride", "g_stride"] if aligned else [],
    )


def compile_scale(dtype: str, target: int | str) -> Resources:
    """Compile the scaling of a gradient for one architecture."""
    signature = {"G": f"*{dtype}", "FACTOR": "*fp32", "stride": "i64", "n_rows": "i32", "n_columns": "i32"}
    return compile_kernel(
        scale._scale, signature, {"BLOCK": scale.BLOCK}, target=target, warps=scale.WARPS, aligned=["G", "stride"]
    )


def compile_sce(dtype: str, target: int | str, n_targets: int = 5) -> dict[str, Resources]:
    """Compile the kernels of the merge for one architecture, models in one dtype."""
    pointers = dict.fromkeys(("BASE", "TARGETS"), f"*{dtype}") | {"HISTOGRAM": "*i64", "COUNTS": "*i32", "OUT": "*fp32"}
    pointers |= dict.fromkeys(("SUMS", "WEIGHTS"), "*fp64")
    scalars = dict.fromkeys(("stride", "n", "begin"), "i32") | dict.fromkeys(("low", "high", "threshold"), "i64")
    scalars |= {"shift": "i32", "tie_stop": "i64", "least_share": "fp64"}
    constants = {"J": n_targets, "BLOCK": sce.BLOCK, "SELECT": True, "DIVIDE": True}
    found = {}
    for kernel in (sce._tally, sce._energies, sce._combine):
        names = kernel.arg_names
        found[kernel.fn.__name__.removeprefix("_")] = compile_kernel(
            kernel,
            pointers | scalars,
            {name: value for name, value in constants.items() if name in names},
            target=target,
            warps=sce.WARPS,
            aligned=[name for name in (*pointers, "stride", "n") if name in names],
            fp_fusion=False,  # the CPU engine rounds every product
        )
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A kernel in one configuration on one architecture; `occupancy` is unknown for AMD."""

    kernel: str
    variant: str
    block: int
    warps: int
    resources: Resources
    occupancy: float | None


def table(target: int | str) -> list[Row]:
    """Compile every configuration for one architecture."""
    compiled = [
        ("sparse_soft_ce", variant.name, *variant.block_and_warps(target), compile_variant(variant, target))
        for variant in VARIANTS
    ]
    compiled.append(("scale", "bf16", scale.BLOCK, scale.WARPS, compile_scale("bf16", target)))
    compiled += [
        (f"sce {name}", f"{dtype}, five targets", sce.BLOCK, sce.WARPS, found)
        for dtype in ("bf16", "fp32")
        for name, found in compile_sce(dtype, target).items()
    ]
    return [
        Row(
            kernel=kernel,
            variant=variant,
            block=block,
            warps=warps,
            resources=found,
            occupancy=None if isinstance(target, str) else occupancy(found, warps, target),
        )
        for kernel, variant, block, warps, found in compiled
    ]
