"""The CUDA devices this process may use, as the driver tells them: no torch, and no context on any of them."""

from __future__ import annotations

import logging
import os
import subprocess
from dataclasses import dataclass

log = logging.getLogger(__name__)

_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.total,name", "--format=csv,noheader,nounits")
_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaDevice:
    """A GPU by its index, its UUID, its vendor's name and its memory."""

    index: str
    uuid: str
    model: str
    memory_bytes: int


def cuda_devices() -> list[CudaDevice]:
    """Return the GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES does not hide; none where there is no nvidia-smi.

    Numbers in CUDA_VISIBLE_DEVICES are taken for nvidia-smi's: where GPUs differ, that wants
    CUDA_DEVICE_ORDER=PCI_BUS_ID. Slices of a GPU (MIG) are not seen.
    """
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
    except OSError:
        return []
    except subprocess.SubprocessError as error:
        log.warning("no GPU is counted, for nvidia-smi is here and fails: %s", error)
        return []
    found = [device for line in done.stdout.splitlines() if (device := _device(line))]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return found
    names = [name.strip() for name in named.split(",") if name.strip()]
    return [d for name in names for d in found if name == d.index or (name[:4] == "GPU-" and d.uuid.startswith(name))]


def _device(line: str) -> CudaDevice | None:
    """Return the device of a line of CSV, None for another line, or a device that shares the host's memory."""
    parts = [part.strip() for part in line.split(",", 3)]
    if len(parts) < 4 or not parts[2].isdecimal():
        return None
    return CudaDevice(index=parts[0], uuid=parts[1], memory_bytes=int(parts[2]) << 20, model=parts[3])
