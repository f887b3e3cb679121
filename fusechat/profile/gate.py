"""Every kernel and configuration the tests hold to its machine code; `fusechat profile kernels` prints them."""

from __future__ import annotations

from dataclasses import dataclass

from fusechat.kernels import sparse_soft_ce
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

    @property
    def block_and_warps(self) -> tuple[int, int]:
        """The columns of one block, and the warps that work on it."""
        block, warps = sparse_soft_ce.block_and_warps(self.vocabulary, 4 if self.dtype == "fp32" else 2)
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
)


def compile_variant(variant: Variant, target: int | str, aligned: bool = True) -> Resources:
    """Compile one variant for an NVIDIA architecture (80, 90, …) or an AMD one (gfx942)."""
    block, warps = variant.block_and_warps
    constants = {
        "DIVERGENCE": variant.divergence, "MISSING": variant.missing, "TEMPERED": variant.extras,
        "TAU": variant.extras, "CAP": variant.extras, "SUMS": variant.extras or variant.missing == "uniform",
        "GRAD": True, "INPLACE": True, "KB": variant.n_entries, "BLOCK": block,
    }  # fmt: skip
    kernel = sparse_soft_ce._sparse_soft_ce
    signature = dict.fromkeys(kernel.arg_names, "fp32") | dict.fromkeys(("Z", "G"), f"*{variant.dtype}")
    signature |= dict.fromkeys(("LABELS", "IDS"), "*i64") | dict.fromkeys(("PARTITION", "CORRECT"), "*i1")
    signature |= {"z_stride": "i64", "g_stride": "i64", "V": "i32", "K": "i32"}
    signature |= dict.fromkeys(("LOGPROBS", "HARD_WEIGHT", "ROW_SCALE", "LOSS", "HARD", "SOFT", "LSE"), "*fp32")
    return compile_kernel(
        kernel,
        signature,
        constants,
        target=target,
        warps=warps,
        aligned=["Z", "G", "z_stride", "g_stride"] if aligned else [],
    )


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
    rows = []
    for variant in VARIANTS:
        block, warps = variant.block_and_warps
        found = compile_variant(variant, target)
        share = None if isinstance(target, str) else occupancy(found, warps, target)
        rows.append(
            Row(
                kernel="sparse_soft_ce", variant=variant.name, block=block, warps=warps, resources=found,
                occupancy=share,
            )
        )  # fmt: skip
    return rows
