"""`fusechat info` says what computes here, as the environment has it."""

from __future__ import annotations

import sys

import pytest
import torch
from typer.testing import CliRunner

import fusechat
from fusechat.cli import app


def _lines() -> dict[str, str]:
    done = CliRunner().invoke(app, ["info"])
    assert done.exit_code == 0, done.output
    return {line[:13].strip(): line[14:] for line in done.output.splitlines()}


def test_the_version_is_asked_for_as_of_any_program() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"fusechat {fusechat.__version__}\n")


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


def test_a_part_that_could_not_start_says_why_and_the_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command meant for a broken installation that ends with the first thing that is broken."""
    monkeypatch.delenv("FUSECHAT_LOSS", raising=False)
    monkeypatch.setenv("FUSECHAT_NATIVE", "require")
    monkeypatch.setitem(sys.modules, "fusechat._native", None)
    monkeypatch.delattr("fusechat._native", raising=False)
    monkeypatch.delitem(sys.modules, "fusechat.merge.native", raising=False)
    monkeypatch.setattr("fusechat.loss.backend._native", None)
    told = _lines()
    assert told["alignment"].startswith("none: FUSECHAT_NATIVE=require, but the compiled engine cannot be imported")
    assert told["merge"].startswith("none: merging needs the compiled engine")
    assert told["loss"].startswith("none on cpu: the compiled engine is missing")
    assert told["torch"][0].isdigit()
    monkeypatch.setenv("FUSECHAT_LOSS", "native")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "none on cuda: FUSECHAT_LOSS is native, which runs on the CPU" in _lines()["loss"]
