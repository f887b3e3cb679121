"""`fusechat info` says what computes here, as the environment has it."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from fusechat.cli import app


def _lines() -> dict[str, str]:
    done = CliRunner().invoke(app, ["info"])
    assert done.exit_code == 0, done.output
    return {line[:13].strip(): line[14:] for line in done.output.splitlines()}


def test_every_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fusechat._native", reason="the compiled engine is not built")
    monkeypatch.delenv("FUSECHAT_LOSS", raising=False)
    monkeypatch.delenv("FUSECHAT_NATIVE", raising=False)
    told = _lines()
    assert (told["alignment"], told["merge"]) == ("native", "native")
    assert told["loss"].startswith("native on cpu")
    assert torch.cuda.is_available() or told["kernels"].startswith("none: ")
    monkeypatch.setenv("FUSECHAT_LOSS", "torch")
    monkeypatch.setenv("FUSECHAT_NATIVE", "off")
    told = _lines()
    assert (told["alignment"], told["loss"].split(",")[0]) == ("numba", "torch on cpu")
