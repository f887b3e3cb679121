"""What a Triton kernel compiles to, without a GPU: registers, spills, shared memory, wide loads, occupancy.

ptxas, cuobjdump and nvdisasm come with Triton itself.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source

from fusechat.errors import ConfigError

TOOLS = Path(nvidia.__file__).parent / "bin"
REGISTERS_PER_SM = 65536
# Warps and shared memory of an SM by compute capability (CUDA programming guide, technical specifications).
_WARPS_PER_SM = {75: 32, 80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
_SHARED_PER_SM = {75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KiB
_BLOCKS_PER_SM = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What a compiled kernel takes; for AMD only registers and spills are read."""

    registers: int
    spills: int
    shared_bytes: int
    wide_loads: int
    """128-bit loads in the code."""
    exponentials: int
    loop_barriers: int = 0
    """Barriers in loops with 128-bit loads."""

    loop_instructions: int = 0
    """Of the longest of these loops; the loops and what is in them are not read for AMD."""


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    target: int | str,
    warps: int,
    aligned: Sequence[str],
    fp_fusion: bool = True,
) -> Resources:
    """Compile a kernel for an NVIDIA architecture (80, 90, …) or an AMD one (gfx942) and read its machine code.

    `aligned` names the pointers and strides that are multiples of 16.
    """
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    gpu = GPUTarget("hip", target, 64) if isinstance(target, str) else GPUTarget("cuda", target, 32)
    compiled = compile_source(source, target=gpu, options={"num_warps": warps, "enable_fp_fusion": fp_fusion})
    shared_bytes = int(compiled.metadata.shared)  # dynamic: the machine code does not show it
    if isinstance(target, str):
        return _amd(compiled.asm["amdgcn"], shared_bytes)
    return _nvidia(compiled.asm["cubin"], shared_bytes)


def blocks_per_sm(found: Resources, warps: int, target: int) -> int:
    """Return how many programs of a kernel live on one SM: what registers, warps and shared memory allow."""
    per_warp = -(-found.registers * 32 // 256) * 256  # registers are handed to a warp in units of 256
    by_registers = REGISTERS_PER_SM // (per_warp * warps)
    by_warps = _WARPS_PER_SM[target] // warps
    by_shared = _SHARED_PER_SM[target] * 1024 // (found.shared_bytes + 1024)  # 1 KiB is the system's
    return min(by_registers, by_warps, by_shared, _BLOCKS_PER_SM)


def occupancy(found: Resources, warps: int, target: int) -> float:
    """Return the share of an SM's warps that a kernel can have in flight."""
    return blocks_per_sm(found, warps, target) * warps / _WARPS_PER_SM[target]


def parse_arch(text: str) -> int | str:
    """Return the target of a name such as sm_90, 90 or gfx942; raises ConfigError naming those that are known."""
    if text.startswith("gfx"):
        return text
    number = text.removeprefix("sm_").rstrip("a")
    if not number.isdecimal() or int(number) not in _WARPS_PER_SM:
        known = ", ".join(f"sm_{arch}" for arch in _WARPS_PER_SM)
        raise ConfigError(f"unknown architecture {text!r}: use {known}, or gfx942")
    return int(number)


def _nvidia(cubin: bytes, shared_bytes: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert found is not None, usage.stdout
    registers, stack = map(int, found.groups())
    loops = [body for body in _loops(code) if any(re.search(r"\bLDG\S*\.128", line) for line in body)]
    return Resources(
        registers=registers,
        spills=stack + len(re.findall(r"\b(?:LDL|STL)", code)),
        shared_bytes=shared_bytes,
        wide_loads=len(re.findall(r"\bLDG\S*\.128", code)),
        exponentials=len(re.findall(r"\bMUFU\.EX2", code)),
        loop_barriers=sum(line.count("BAR.") for body in loops for line in body),
        loop_instructions=max(map(len, loops), default=0),
    )


def _loops(code: str) -> list[list[str]]:
    """Return the instructions from each label to a branch back to it."""
    label: dict[str, int] = {}
    found: list[list[str]] = []
    lines: list[str] = []
    for line in code.splitlines():
        if name := re.match(r"\s*(\.L_x_\d+):", line):
            label[name[1]] = len(lines)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1])
            back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction[1])
            if back and back[1] in label:
                found.append(lines[label[back[1]] :])
    return found


def _amd(assembly: str, shared_bytes: int) -> Resources:
    def count(pattern: str) -> int:
        found = re.search(rf"\.{pattern}:\s*(\d+)", assembly)
        assert found is not None, pattern
        return int(found.group(1))

    return Resources(
        registers=count("vgpr_count"),
        spills=count("vgpr_spill_count") + count("sgpr_spill_count"),
        shared_bytes=shared_bytes,
        wide_loads=len(re.findall(r"\b(?:global|buffer)_load_dwordx4", assembly)),
        exponentials=len(re.findall(r"\bv_exp_f32", assembly)),
    )
