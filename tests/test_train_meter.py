"""What training reports of the device it is on."""

from __future__ import annotations

import pytest
import torch

from fusechat.train.meter import Meter


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("AMD Instinct MI300X", None),
    ],
)
def test_utilisation_is_of_the_devices_own_peak(
    device: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a share of another card's FLOP/s, whose name this one's begins with."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    assert Meter(["pivot"], 1.0).peak_flops == peak
