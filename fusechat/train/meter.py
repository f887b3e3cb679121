"""What training reports beside the loss: its parts, who taught, how fast, and how much memory."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Dense bf16 FLOP/s of one device, from the vendors' data sheets.
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "A10": 125e12,
}


class Meter:
    """Sums on the device between two logs; reading them is the only wait for it."""

    def __init__(self, candidates: Sequence[str], flops_per_token: float) -> None:
        self.candidates = list(candidates)
        self.flops_per_token = flops_per_token
        self.peak_flops = _peak_flops()
        self._begin()

    def _begin(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.began = time.perf_counter()

    def add(self, parts: dict[str, torch.Tensor], inputs: dict[str, Any]) -> None:
        """Count one micro-batch."""
        origin, taught, weight = inputs["origin"], inputs["taught"], inputs["row_weight"]
        # A position whose distribution was split into several rows counts once.
        won = torch.zeros(len(self.candidates), device=weight.device).index_add_(0, origin, weight)
        mask = inputs.get("attention_mask")
        counts = {
            "hard": parts["hard"].detach(),
            "soft": parts["soft"].detach(),
            "rows": weight.sum(),
            "covered": (weight * (taught > 0)).sum(),
            "taught": (weight * taught).sum(),
            "tokens": inputs["input_ids"].new_tensor(inputs["input_ids"].numel()) if mask is None else mask.sum(),
            "won": won,
        }
        if "router" in parts:
            counts["router"] = parts["router"].detach()
        for name, value in counts.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double()

    def read(self, accelerator: Any, hard_weight_at: Callable[[float], float], state: Any) -> dict[str, Any]:
        """Return the means since the last reading, over all processes, and begin anew."""
        seconds = time.perf_counter() - self.began
        sums = {name: accelerator.reduce(value, "sum") for name, value in self.sums.items()}
        values = {name: value.tolist() for name, value in sums.items()}
        self._begin()
        if not values:
            return {}
        rows, tokens_per_second = max(values["rows"], 1.0), values["tokens"] / seconds
        logs: dict[str, Any] = {
            "hard_loss": values["hard"] / rows,
            "soft_loss": values["soft"] / max(values["covered"], 1.0),
            "hard_weight": hard_weight_at((state.global_step - 1) / max(state.max_steps, 1)),
            "coverage": values["covered"] / rows,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": tokens_per_second / accelerator.num_processes,
            "peak_memory_bytes": _peak_memory_bytes(),
        }
        if "router" in values:
            logs["router_loss"] = values["router"] / rows
        if len(self.candidates) > 1:
            logs |= {f"share_{name}": n / rows for name, n in zip(self.candidates, values["won"])}
        if self.peak_flops is not None:
            logs["mfu"] = self.flops_per_token * tokens_per_second / (self.peak_flops * accelerator.num_processes)
        return logs


def _peak_flops() -> float | None:
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_name()
    # A whole word: an A10G and an RTX A1000 are no A10 and no A100. A GH200 has an H200's.
    return next((flops for name, flops in _PEAK_FLOPS.items() if re.search(rf"\bG?{name}\b", device)), None)


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
