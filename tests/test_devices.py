"""Which CUDA devices this process may use, by a driver's tool that says what a test wants."""

from __future__ import annotations

from typing import Any

import pytest

from fusechat.devices import cuda_devices


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, ["0", "1", "2"]),
        ("2,0", ["2", "0"]),
        ("GPU-1111", ["1"]),
        ("", []),
        ("-1", []),
        ("1, 7", ["1"]),
        ("MIG-3", []),
    ],
)
def test_hidden_devices_are_left_out(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, visible: str | None, indices: list[str]
) -> None:
    gpus("NVIDIA A", "NVIDIA B", "NVIDIA B, 2nd")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = cuda_devices()
    assert [device.index for device in found] == indices
    assert all(device.memory_bytes == 40 << 30 for device in found)
    assert visible is not None or found[-1].model == "NVIDIA B, 2nd"


def test_without_a_driver_there_is_none_and_one_that_fails_is_told(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    gpus("NVIDIA GB10", mebibytes="[N/A]")  # shares the host's memory
    assert cuda_devices() == []
    (tmp_path / "driver" / "nvidia-smi").write_text("#!/bin/sh\necho 'Failed to initialize NVML'; exit 9\n")
    assert not caplog.messages
    assert cuda_devices() == []
    assert "nvidia-smi is here and fails" in caplog.text
    caplog.clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda_devices() == []
    assert not caplog.messages
