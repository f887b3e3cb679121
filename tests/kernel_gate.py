"""Compiles the Triton kernels without a GPU and reads their machine code.

Run as a script it prints the table of docs/kernels.md.

python tests/kernel_gate.py
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source

from fusechat.kernels import sparse_soft_ce

TOOLS = Path(nvidia.__file__).parent / "bin"
NVIDIA = (80, 90, 100)
AMD = "gfx942"
REGISTERS_PER_SM = 65536


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What a compiled kernel takes; for AMD only registers and spills are read."""

    registers: int
    spills: int
    wide_loads: int
    exponentials: int


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


def shape_of(variant: Variant, target: int | str) -> tuple[int, int]:
    """Return the block and the warps that the launcher would take."""
    wants_registers = variant.n_entries > 64 or variant.extras or variant.missing == "uniform"
    wants_registers |= variant.ranges or isinstance(target, str)
    return sparse_soft_ce.block_and_warps(
        variant.vocabulary, 4 if variant.dtype == "fp32" else 2, wants_registers=wants_registers
    )


def compile_variant(variant: Variant, target: int | str, aligned: bool = True) -> Resources:
    """Compile one variant for an NVIDIA architecture (80, 90, …) or an AMD one (gfx942)."""
    kernel = sparse_soft_ce._sparse_soft_ce
    names = kernel.arg_names
    block, warps = shape_of(variant, target)
    constants = {
        "DIVERGENCE": variant.divergence, "MISSING": variant.missing, "TEMPERED": variant.extras,
        "TAU": variant.extras, "CAP": variant.extras, "SUMS": variant.extras or variant.missing == "uniform",
        "GRAD": True, "INPLACE": True, "SELECT": variant.ranges, "RANGES": variant.ranges,
        "KB": variant.n_entries, "BLOCK": block,
    }  # fmt: skip
    signature = dict.fromkeys(("Z", "G", "SAVED"), f"*{variant.dtype}") | dict.fromkeys(("LABELS", "IDS"), "*i64")
    signature |= dict.fromkeys(("PARTITION", "CORRECT", "HAS_RANGES"), "*i1")
    signature |= dict.fromkeys(("ORDER", "LOW", "HIGH"), "*i32")
    signature |= {"z_stride": "i64", "g_stride": "i64", "N": "i32", "V": "i32", "K": "i32"}
    signature |= dict.fromkeys(("LOGPROBS", "HARD_WEIGHT", "ROW_SCALE", "LOSS", "HARD", "SOFT", "LSE"), "*fp32")
    signature |= dict.fromkeys(constants, "constexpr")
    aligned_names = ["Z", "G", "z_stride", "g_stride"] if aligned else []
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "fp32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned_names},
    )
    gpu = GPUTarget("hip", target, 64) if isinstance(target, str) else GPUTarget("cuda", target, 32)
    compiled = compile_source(source, target=gpu, options={"num_warps": warps})
    return _amd(compiled.asm["amdgcn"]) if isinstance(target, str) else _nvidia(compiled.asm["cubin"])


def _nvidia(cubin: bytes) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    return Resources(
        registers=registers,
        spills=stack + len(re.findall(r"\b(?:LDL|STL)", code)),
        wide_loads=len(re.findall(r"\bLDG\S*\.128", code)),
        exponentials=len(re.findall(r"\bMUFU\.EX2", code)),
    )


def _amd(assembly: str) -> Resources:
    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly).group(1))

    return Resources(
        registers=count("vgpr_count"),
        spills=count("vgpr_spill_count") + count("sgpr_spill_count"),
        wide_loads=len(re.findall(r"\b(?:global|buffer)_load_dwordx4", assembly)),
        exponentials=len(re.findall(r"\bv_exp_f32", assembly)),
    )


def table() -> str:
    """Return the Markdown table of all variants and architectures."""
    import triton

    lines = [
        f"Triton {triton.__version__}: registers a thread / 128-bit loads in the code, and spills where there are any.",
        "",
        "| variant | block, warps | sm_80 | sm_90 | sm_100 | gfx942 |",
        "|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        block, warps = shape_of(variant, 90)
        cells = []
        for target in (*NVIDIA, AMD):
            found = compile_variant(variant, target)
            cells.append(
                f"{found.registers} / {found.wide_loads}" + (f", {found.spills} spills" if found.spills else "")
            )
        lines.append(f"| {variant.name} | {block}, {warps} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
