"""Fixtures shared by all tests: where the real data is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers, models and texts; skips where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FUSECHAT_SHARED_DATA", default))
    if not (folder / "manifest.jsonl").exists():
        pytest.skip("real data not here: ../shared/data is absent and FUSECHAT_SHARED_DATA names no folder")
    return folder
