"""Shards as Ray tasks give the bytes one process gives."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from merge_family import checksums, make_family, read_all, recipe, write_model

from fusechat.errors import ConfigError, DataError
from fusechat.merge import driver, merge, on_ray


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


def test_a_cluster_without_room_is_refused_before_the_tensors_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours of reading, for weights of the whole model, that a refusal follows."""
    small = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.setattr(on_ray, "ray_cluster", lambda _: nullcontext(small))
    read: list[str] = []
    monkeypatch.setattr(driver, "measure_energy", lambda job, plan: read.append(plan.name) or [1.0] * 3)
    config = recipe(make_family(tmp_path), "varm", granularity="model")
    with pytest.raises(ConfigError, match=r"4 CPUs, and no machine .*: lower --threads"):
        merge(config, tmp_path / "out", threads=4, ray="local")
    assert read == []


def test_without_ray_the_mend_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where Ray is absent."""
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install"):
        merge(recipe(make_family(tmp_path)), tmp_path / "out", ray="local")
