"""Shards aligned by actors of Ray are those one process makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from aligned_stores import TEXTS, byte_level, sentencepiece, write_store

import fusechat
from fusechat.artifact import sha256_file
from fusechat.errors import ConfigError, FormatError


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Path, Path]:
    pivot = write_store(tmp_path / "pivot", byte_level(TEXTS, 330), k=4, per_shard=4, seed=1)
    source = write_store(tmp_path / "source", sentencepiece(TEXTS, 360), k=6, per_shard=3, seed=2, skip=(3, 8))
    return pivot, source


def checksums(directory: Path) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in sorted(directory.iterdir())}


def test_same_store_as_one_process(tmp_path: Path, stores: tuple[Path, Path]) -> None:
    """Catches a shard that is lost or made twice, counts of some shards only, and errors without their message."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'fusechat[ray]'")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)  # so that a pass starts one actor
    try:
        progress: list[tuple[int, int]] = []
        fusechat.align(*stores, tmp_path / "one", vocab="ms")
        fusechat.align(*stores, tmp_path / "ray", vocab="ms", ray="local", progress=lambda *d: progress.append(d))
        assert checksums(tmp_path / "one") == checksums(tmp_path / "ray")
        assert progress[-1][0] == progress[-1][1]
        (stores[1] / "shard-00001.safetensors").write_bytes(b"")
        with pytest.raises(FormatError, match="shard-00001"):
            fusechat.align(*stores, tmp_path / "damaged", ray="local")
        assert not (tmp_path / "damaged").exists()
    finally:
        ray.shutdown()


def test_without_ray_the_mend_is_named(
    tmp_path: Path, stores: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback where Ray is absent, and a store left behind."""
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install"):
        fusechat.align(*stores, tmp_path / "out", ray="local")
    assert not (tmp_path / "out").exists()
