"""One line of a plan: what a stage needs and how long it takes, with the parts it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from fusechat.artifact import Json

Parts = Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """What a stage needs of one device, of the host and of the disk, in bytes, by what it is for.

    `devices` is how many work on it (0: the host alone). `refused` says why the stage would not start however much
    memory there is, `changes` what to set when it does not fit.
    """

    stage: str
    name: str
    parameters: int
    devices: int
    device_parts: Parts = field(default_factory=dict)
    host_parts: Parts = field(default_factory=dict)
    disk_parts: Parts = field(default_factory=dict)
    temporary_disk_parts: Parts = field(default_factory=dict)
    device_limit_bytes: int = 0
    host_limit_bytes: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    settings: Mapping[str, object] = field(default_factory=dict)
    refused: str = ""
    changes: tuple[str, ...] = ()

    @property
    def device_bytes(self) -> int:
        """Peak memory of one device."""
        return sum(self.device_parts.values())

    @property
    def host_bytes(self) -> int:
        """Peak memory of the host, over all processes."""
        return sum(self.host_parts.values())

    @property
    def disk_bytes(self) -> int:
        """What the stage leaves on the disk."""
        return sum(self.disk_parts.values())

    @property
    def temporary_disk_bytes(self) -> int:
        """What it needs besides while it runs."""
        return sum(self.temporary_disk_parts.values())

    @property
    def fits(self) -> bool:
        """Whether it starts, and device and host hold it."""
        held = self.device_bytes <= self.device_limit_bytes and self.host_bytes <= self.host_limit_bytes
        return held and not self.refused

    def as_json(self) -> Json:
        """Return the plan's JSON form."""
        totals = {"device_bytes": self.device_bytes, "host_bytes": self.host_bytes, "disk_bytes": self.disk_bytes}
        totals["temporary_disk_bytes"] = self.temporary_disk_bytes
        return {**asdict(self), **totals, "fits": self.fits}
