"""The machine a plan is for: shipped facts, a file of the same form, or this computer."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusechat.artifact import Json
from fusechat.devices import cuda_devices
from fusechat.errors import ConfigError, nearest
from fusechat.plan.models import shipped
from fusechat.quantity import parse_size
from fusechat.yaml_file import read_yaml

_KEYS = ("device", "memory", "host_memory", "devices", "tflops", "disk_rate", "efficiency")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """`devices` devices of `memory_bytes` each; rates per second of one device; efficiencies are shares of the peak."""

    name: str
    device: str
    devices: int
    memory_bytes: int
    host_memory_bytes: int
    flops: dict[str, float]
    disk_rate_bytes: float
    efficiency: dict[str, float]
    assumed: str = ""
    """What of these facts is another GPU's."""

    @property
    def on_cpu(self) -> bool:
        """Whether there is no accelerator: device and host memory are then one."""
        return self.device == "cpu"

    def rate(self, stage: str, dtype: str) -> float:
        """Return the FLOP/s that one device is assumed to attain in a stage."""
        peak = self.flops["float32" if dtype == "float32" else "bfloat16"]
        return peak * self.efficiency["train" if stage == "train" else "extract"]


def load_hardware(name: str | None, *, gpus: int | None = None, memory_bytes: int | None = None) -> Hardware:
    """Return known hardware, this computer's CPU (`cpu`), or what a YAML or JSON file says; both others alter it.

    Without a name: GPUs of so much memory, or else the CUDA devices that are visible here, or this computer's CPU.
    Raises ConfigError, naming the nearest known hardware, or the key of the file that is wrong.
    """
    known = shipped("hardware.json")
    if name is None:
        return _unnamed(gpus, memory_bytes)
    if name == "cpu":
        hardware = this_computer()
    elif name in known:
        hardware = _parse(name, known[name])
    elif Path(name).is_file():
        hardware = _parse(Path(name).stem, _read(Path(name)))
    else:
        names = [*known, "cpu"]
        raise ConfigError(f"no hardware {name!r}, nor a file of its facts (YAML or JSON){nearest(name, names)}")
    if gpus is not None:
        if hardware.on_cpu:
            raise ConfigError("--gpus has no meaning with --hardware cpu: leave it out, or name a GPU")
        hardware = replace(hardware, devices=gpus)
    if memory_bytes is not None:
        hardware = replace(hardware, memory_bytes=memory_bytes)
    return hardware


def _unnamed(gpus: int | None, memory_bytes: int | None) -> Hardware:
    visible = cuda_devices()
    if memory_bytes is not None:
        count = gpus or len(visible) or 1
        return replace(_like(memory_bytes, ""), name="GPU", devices=count)
    if visible:
        smallest = min(visible, key=lambda device: device.memory_bytes)
        like = _like(smallest.memory_bytes, smallest.model)
        return replace(
            like, name=smallest.model, devices=gpus or len(visible), host_memory_bytes=_host_memory_bytes()
        )  # fmt: skip
    if gpus is not None:
        raise ConfigError("--gpus: no GPU is visible here, so say which they are: --gpu-memory 40GB, or --hardware")
    return this_computer()


def _like(memory_bytes: int, model: str) -> Hardware:
    """Return GPUs of so much memory, the rest as the known one has it that has the vendor's name, or the nearest memory
    (the slower of two)."""
    known = [_parse(name, values) for name, values in shipped("hardware.json").items()]
    joined = model.lower().replace(" ", "")
    of_that_name = [one for one in known if one.name.partition("-")[0] in joined]
    like = min(
        of_that_name or known, key=lambda one: (abs(one.memory_bytes - memory_bytes), one.flops["bfloat16"])
    )  # fmt: skip
    own = "speed and disk" if model else "speed, host memory and disk"
    why = "" if of_that_name else ", the known GPU nearest in memory (--hardware names another)"
    return replace(like, memory_bytes=memory_bytes, assumed=f"{own} as of {like.name}{why}")


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def this_computer() -> Hardware:
    """Return this computer's memory and its measured FLOP/s in float32 products (a quarter of a second)."""
    import numpy as np

    total = _host_memory_bytes()
    a = np.ones((768, 768), np.float32)
    best = 0.0
    started = time.perf_counter()
    while time.perf_counter() - started < 0.25:
        begin = time.perf_counter()
        a @ a
        best = max(best, 2 * 768**3 / (time.perf_counter() - begin))
    return Hardware(
        name="cpu",
        device="cpu",
        devices=1,
        memory_bytes=total,
        host_memory_bytes=total,
        flops={"float32": best, "bfloat16": best},
        disk_rate_bytes=1e9,
        efficiency={"extract": 0.5, "train": 0.5},
    )


def _read(path: Path) -> Json:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping with the keys {', '.join(_KEYS)}")
    return values


def _parse(name: str, values: Json) -> Hardware:
    for key in values:
        if key not in _KEYS:
            raise ConfigError(f"hardware {name}: unknown key `{key}`{nearest(str(key), _KEYS)}")
    missing = [key for key in _KEYS if key not in values]
    if missing:
        raise ConfigError(f"hardware {name} lacks {', '.join(missing)}")

    def number(value: Any, key: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ConfigError(f"hardware {name}: {key} is {value!r}, expected a number above 0")
        return float(value)

    def numbers(key: str, wanted: tuple[str, ...]) -> dict[str, float]:
        table = values[key]
        if not isinstance(table, dict) or set(table) != set(wanted):
            raise ConfigError(f"hardware {name}: {key} must be a mapping with {' and '.join(wanted)}")
        return {k: number(v, f"{key}.{k}") for k, v in table.items()}

    if values["device"] not in ("cuda", "cpu"):
        raise ConfigError(f"hardware {name}: device is {values['device']!r}, expected cuda or cpu")
    devices = number(values["devices"], "devices")
    if devices != int(devices):
        raise ConfigError(f"hardware {name}: devices is {devices:g}, expected a whole number")
    efficiency = numbers("efficiency", ("extract", "train"))
    for stage, share in efficiency.items():
        if share > 1:
            raise ConfigError(f"hardware {name}: efficiency.{stage} is {share:g}, expected a share, at most 1")
    return Hardware(
        name=name,
        device=values["device"],
        devices=int(devices),
        memory_bytes=parse_size(str(values["memory"])),
        host_memory_bytes=parse_size(str(values["host_memory"])),
        flops={k: v * 1e12 for k, v in numbers("tflops", ("bfloat16", "float32")).items()},
        disk_rate_bytes=float(parse_size(str(values["disk_rate"]))),
        efficiency=efficiency,
    )
