"""Every method of merging against its plain definition, on models in mixed dtypes and layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from merge_family import SHAPES, checksums, expect, make_family, read_all, recipe, write_model

from fusechat.errors import ConfigError, DataError
from fusechat.merge import merge, reference
from fusechat.merge.methods import random_key
from fusechat.merge.settings import layer_of

F32 = npt.NDArray[np.float32]
WEIGHTS = [0.2, 0.5, 0.4]


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    """A base and three targets in different dtypes and shardings."""
    return make_family(tmp_path)


@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(family: dict[str, Path], tmp_path: Path, normalize: bool) -> None:
    """Catches λ or the weights' sum applied wrongly."""
    merge(recipe(family, "task_arithmetic", parameters={"lambda": 0.7, "normalize": normalize}), tmp_path / "out")
    expect(
        family,
        tmp_path / "out",
        lambda _, b, t: reference.task_arithmetic(b, t, WEIGHTS, normalize=normalize, scale=0.7),
    )


@pytest.mark.parametrize("density", [[0.2, 0.6, 1.0], [0.05, 0.5, 0.0], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties(family: dict[str, Path], tmp_path: Path, density: list[float], normalize: bool) -> None:
    """Catches a wrong k, the sign elected by unweighted deltas, a wrong divisor."""
    config = recipe(family, "ties", parameters={"normalize": normalize, "lambda": 1.2})
    for model, weight, share in zip(config["models"], (0.2, -0.5, 0.4), density):
        model["parameters"] = {"weight": weight, "density": share}
    merge(config, tmp_path / "out")

    def formula(_: str, base: F32, targets: F32) -> npt.NDArray[np.float64]:
        n = base.size
        shares = [max(d, 1.0000001 / n) if 0 < d < 1 and n else d for d in density]  # at least one element is kept
        return reference.task_arithmetic(
            base, targets, [0.2, -0.5, 0.4], normalize=normalize, scale=1.2, density=shares, elect=True
        )

    expect(family, tmp_path / "out", formula)


def draw(seed: int, model: int, tensor: str, n: int, density: float) -> npt.NDArray[np.bool_]:
    """Which elements DARE keeps: SplitMix64 of key and index against the density."""
    with np.errstate(over="ignore"):
        x = np.uint64(random_key(seed, model, tensor)) + np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray((x ^ (x >> np.uint64(31))) >> np.uint64(32) < np.uint64(density * 2**32))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare(family: dict[str, Path], tmp_path: Path, method: str) -> None:
    """Catches a draw that depends on anything but seed, model, tensor and element, and a wrong rescaling."""
    density = [0.3, 0.8, 1.0]
    config = recipe(family, method, seed=11)
    for model, weight, share in zip(config["models"], WEIGHTS, density):
        model["parameters"] = {"weight": weight, "density": share}
    merge(config, tmp_path / "out", threads=3, max_shard_bytes=2000)

    def formula(name: str, base: F32, targets: F32) -> npt.NDArray[np.float64]:
        kept = np.stack([draw(11, j, name, base.size, d) for j, d in enumerate(density)])
        return reference.dare(
            base, targets, WEIGHTS, kept, density, normalize=False, scale=1.0, elect=method == "dare_ties"
        )

    expect(family, tmp_path / "out", formula)


def test_dare_keeps_the_share_it_should_and_differs_by_seed() -> None:
    """Catches a biased or constant draw."""
    kept = draw(0, 0, "w", 100_000, 0.3)
    assert abs(kept.mean() - 0.3) < 0.006
    assert abs(np.corrcoef(kept[1:], kept[:-1])[0, 1]) < 0.02
    for other in (draw(1, 0, "w", 100_000, 0.3), draw(0, 1, "w", 100_000, 0.3), draw(0, 0, "v", 100_000, 0.3)):
        assert abs((kept & other).mean() - 0.09) < 0.006


def test_what_dare_drops_does_not_survive(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches survivors counted as what they are scaled to, with which no share is small and no warning comes."""
    density = [0.3, 0.8, 1.0]
    config = recipe(family, "dare_linear", seed=11)
    for model, weight, share in zip(config["models"], WEIGHTS, density):
        model["parameters"] = {"weight": weight, "density": share}
    found = merge(config, tmp_path / "out")
    models = {name: read_all(path) for name, path in family.items()}
    kept, whole = np.zeros(3), np.zeros(3)
    for name in SHAPES:
        base, *targets = (m[name].astype(np.float32).ravel() for m in models.values())
        for j, target in enumerate(targets):
            energy = (target - base).astype(np.float64) ** 2
            kept[j] += energy[draw(11, j, name, base.size, density[j])].sum()
            whole[j] += energy.sum()
    np.testing.assert_allclose(found["surviving_share"], kept / whole, rtol=1e-6)
    assert [warning.split(" of the update")[0] for warning in found["warnings"]] == [f"only {kept[0] / whole[0]:.0%}"]


@pytest.mark.parametrize("granularity", ["matrix", "layer", "model", "parameter"])
@pytest.mark.parametrize("place", ["parameters", "top"])
def test_varm(family: dict[str, Path], tmp_path: Path, granularity: str, place: str) -> None:
    """Catches weights of the wrong unit (v1, eq. 7)."""
    changes = {"granularity": granularity} if place == "top" else {"parameters": {"granularity": granularity}}
    merge(recipe(family, "varm", **changes), tmp_path / "out")
    models = {name: read_all(path) for name, path in family.items()}

    def deltas(name: str) -> npt.NDArray[np.float64]:
        base = models["base"][name].astype(np.float32)
        return np.stack(
            [(m[name].astype(np.float32) - base).astype(np.float64) for k, m in models.items() if k != "base"]
        )

    def formula(name: str, base: F32, targets: F32) -> npt.NDArray[np.float64]:
        unit = {
            "matrix": lambda other: other == name,
            "layer": lambda other: other == name or (layer_of(name) is not None and layer_of(other) == layer_of(name)),
            "model": lambda _: True,
            "parameter": lambda _: False,
        }[granularity]
        energy = sum((deltas(other) ** 2).reshape(3, -1).sum(1) for other in SHAPES if unit(other))
        return reference.varm(base, targets, None if granularity == "parameter" else np.asarray(energy))

    expect(family, tmp_path / "out", formula)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(family: dict[str, Path], tmp_path: Path, t: float) -> None:
    """Catches swapped ends and a wrong angle; near-parallel matrices fall back to the line."""
    turned = {name: np.roll(values, 1) * np.float32(1.5) for name, values in read_all(family["base"]).items()}
    turned["model.norm.weight"] = read_all(family["base"])["model.norm.weight"] * np.float32(2)
    pair = {"base": family["base"], "a": write_model(tmp_path / "turned", turned)}
    merge(recipe(pair, "slerp", parameters={"t": t}), tmp_path / "out")
    expect(pair, tmp_path / "out", lambda _, b, targets: reference.slerp(b, targets[0], t))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_slerp_leaves_out_what_is_not_finite_in_the_base(family: dict[str, Path], tmp_path: Path, bad: float) -> None:
    """Catches one NaN of the base that turns the arc between two models into the line, without a word."""
    rng = np.random.default_rng(3)
    base = {name: values.astype(np.float32) for name, values in read_all(family["base"]).items()}
    turned = {name: rng.normal(0, 0.5, values.shape).astype(np.float32) for name, values in base.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    base[name][3, 5] = bad
    models = {"base": base, "turned": turned}
    pair = {k: write_model(tmp_path / f"{k}-f32", tensors, dtype="F32") for k, tensors in models.items()}
    config = recipe(pair, "slerp", parameters={"t": 0.3}, out_dtype="float32")
    with pytest.raises(DataError, match=r"1 values.*\[3, 5\].*--allow-nonfinite to write zeros there"):
        merge(config, tmp_path / "out")
    merge(config, tmp_path / "out", allow_nonfinite=True)
    base[name][3, 5] = turned[name][3, 5] = 0
    expected = reference.slerp(base[name].ravel(), turned[name].ravel(), 0.3)
    np.testing.assert_allclose(read_all(tmp_path / "out")[name].ravel(), expected, rtol=1e-6, atol=1e-7)


def test_filters_and_gradients(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches the wrong rule or the wrong end of a gradient."""
    config = recipe(family, "task_arithmetic")
    weights: list[Any] = [
        [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.25}],
        [0.1, 0.3],
        {"filter": "*", "value": 0.5},
    ]
    for model, weight in zip(config["models"], weights):
        model["parameters"] = {"weight": weight}
    merge(config, tmp_path / "out")

    def formula(name: str, base: F32, targets: F32) -> npt.NDArray[np.float64]:
        depth = layer_of(name) or 0
        first = float(depth) if "mlp" in name else 0.25
        w = [first, 0.1 + 0.2 * depth, 0.5]
        return reference.task_arithmetic(base, targets, w, normalize=False, scale=1.0)

    expect(family, tmp_path / "out", formula)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "varm", "slerp", "task_arithmetic"])
def test_threads_and_shards_do_not_change_a_bit(family: dict[str, Path], tmp_path: Path, method: str) -> None:
    """Catches results that depend on how the work is cut, on tensors of several segments."""
    rng = np.random.default_rng(5)
    base = {"w": rng.normal(0, 1, (700, 300)).astype(np.float32), "v": rng.normal(0, 1, (300,)).astype(np.float32)}
    paths = {"base": write_model(tmp_path / "x", base)}
    for name in ("a", "b")[: 1 if method == "slerp" else 2]:
        moved = {k: v + rng.normal(0, 0.1, v.shape).astype(np.float32) for k, v in base.items()}
        paths[name] = write_model(tmp_path / f"x{name}", moved)
    config = recipe(paths, method)
    if method == "slerp":
        config["parameters"] = {"t": 0.4}
    elif "ties" in method:
        config["parameters"] = {"density": 0.4}
    merge(config, tmp_path / "one", threads=1)
    merge(config, tmp_path / "many", threads=3, max_memory_bytes=8 * 10**9)
    assert checksums(tmp_path / "one")["model.safetensors"] == checksums(tmp_path / "many")["model.safetensors"]
    assert checksums(tmp_path / "one")["merge_stats.json"] == checksums(tmp_path / "many")["merge_stats.json"]


def test_the_summary_says_what_survives_and_warns(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a report that flatters: at τ = 0.1 the paper's variant drops most of every update."""
    few = merge(recipe(family, parameters={"select_topk": 0.1, "variant": "paper"}), tmp_path / "few")
    assert all(share < 0.5 for share in few["surviving_share"])
    assert len(few["warnings"]) == 3
    assert "survives" in few["warnings"][0]
    models = {name: read_all(path) for name, path in family.items()}
    merged = read_all(tmp_path / "few")
    touched = [
        (merged[n].astype(np.float32) != models["base"][n].astype(np.float32)).mean()
        for n in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight")
    ]
    assert max(touched) <= 0.1
    stats = json.loads((tmp_path / "few" / "merge_stats.json").read_text())
    assert stats["model.embed_tokens.weight"]["touched_share"] <= 0.1
    linear = merge(recipe(family, "linear"), tmp_path / "linear")
    assert linear["warnings"] == []


def test_one_target_needs_no_variance(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a merge of one target that returns the base, and one that is asked to select by nothing."""
    pair = {"base": family["base"], "a": family["a"]}
    merge(recipe(pair, parameters={"select_topk": 0.1, "variant": "fuseai"}), tmp_path / "out")
    for name, values in read_all(tmp_path / "out").items():
        np.testing.assert_array_equal(values, read_all(family["a"])[name])
    with pytest.raises(ConfigError, match="needs two targets"):
        merge(recipe(pair, parameters={"select_topk": 0.1, "variant": "paper"}), tmp_path / "bad")
    for value in ([{"filter": "mlp", "value": 0.1}, 1.0], [1.0, 0.1]):
        with pytest.raises(ConfigError, match="needs two targets"):
            merge(recipe(pair, parameters={"select_topk": value, "variant": "paper"}), tmp_path / "bad")
