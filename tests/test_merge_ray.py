"""Shards as Ray tasks give the bytes one process gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from merge_family import checksums, make_family, read_all, recipe, write_model

from fusechat.errors import ConfigError, DataError
from fusechat.merge import merge


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sce", "varm"])
def test_same_bytes_as_one_process(tmp_path: Path, method: str) -> None:
    """Catches a shard that is lost, merged twice, or merged with other numbers."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'fusechat[ray]'")
    family = make_family(tmp_path)
    config = recipe(family, method, **({"granularity": "model"} if method == "varm" else {}))
    merge(config, tmp_path / "one", max_shard_bytes=2000)
    merge(config, tmp_path / "ray", max_shard_bytes=2000, threads=1, ray="local")
    one, ray = checksums(tmp_path / "one"), checksums(tmp_path / "ray")
    weights = [name for name in one if name.endswith(".safetensors")]
    assert len(weights) > 3
    for name in weights:
        assert one[name] == ray[name]
    bad = read_all(family["a"])
    bad["model.norm.weight"][0] = np.inf
    write_model(family["a"], bad, shards=3)
    with pytest.raises(DataError, match=r"model\.norm\.weight.*NaN or infinite"):
        merge(config, tmp_path / "bad", max_shard_bytes=2000, threads=1, ray="local")


def test_without_ray_the_mend_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where Ray is absent."""
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install"):
        merge(recipe(make_family(tmp_path)), tmp_path / "out", ray="local")
