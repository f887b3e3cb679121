"""The merge of whole models: right in every layout, whole or absent, and nothing wrong let through."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from merge_family import SHAPES, checksums, expect, make_family, read_all, recipe, write_model

from fusechat.errors import ConfigError, DataError, FormatError, FusechatError, MismatchError
from fusechat.merge import estimate, merge, output, reference, tensor
from fusechat.merge.verify import verify

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    """A base and three targets in different dtypes and shardings."""
    return make_family(tmp_path)


@pytest.mark.parametrize("variant", ["paper", "fuseai", "mergekit"])
def test_sce(family: dict[str, Path], tmp_path: Path, variant: Any) -> None:
    """Catches mixed-up models, tensors, dtypes or shards, against the definition per matrix."""
    provenance = merge(recipe(family, parameters={"select_topk": 0.3, "variant": variant}), tmp_path / "out")
    expect(family, tmp_path / "out", lambda _, b, t: reference.sce(b, t, select_topk=0.3, variant=variant))
    assert provenance["n_tensors"] == len(SHAPES)
    assert len(provenance["surviving_share"]) == 3
    stats = json.loads((tmp_path / "out" / "merge_stats.json").read_text())
    matrix = stats["model.layers.0.mlp.up_proj.weight"]
    assert matrix["k"] == 33 * 16 * 3 // 10
    assert sum(matrix["weights"]) == pytest.approx(1)


def test_sce_of_the_module_and_of_the_file_are_one(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a second meaning of the same words: fusechat.merge(...), a mapping, a YAML file."""
    import fusechat

    fusechat.merge(recipe(family), tmp_path / "mapping")
    (tmp_path / "m.yml").write_text(yaml.safe_dump(recipe(family)))
    merge(str(tmp_path / "m.yml"), str(tmp_path / "file"))
    a, b = checksums(tmp_path / "mapping"), checksums(tmp_path / "file")
    assert a["model.safetensors"] == b["model.safetensors"]


def test_linear(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a wrong normalisation, and a base that takes part."""
    merge(recipe(family, "linear"), tmp_path / "out")
    expect(family, tmp_path / "out", lambda _, b, t: reference.linear(t, [0.2, 0.5, 0.4], normalize=True))
    merge(recipe(family, "linear", parameters={"normalize": False}, out_dtype="float32"), tmp_path / "raw")
    expect(family, tmp_path / "raw", lambda _, b, t: reference.linear(t, [0.2, 0.5, 0.4], normalize=False), "F32")
    assert json.loads((tmp_path / "raw" / "config.json").read_text())["dtype"] == "float32"


def test_output_directory_is_a_model(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a forgotten file, and files of a target in place of the base's."""
    out = tmp_path / "out"
    merge(recipe(family), out)
    assert not list(tmp_path.glob("*.partial"))
    assert json.loads((out / "tokenizer.json").read_text()) == {"of": "base"}
    for name in (
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "README.md",
        "merge.yaml",
        "provenance.json",
    ):
        assert (out / name).exists()
    assert str(family["a"]) in (out / "README.md").read_text()
    assert yaml.safe_load((out / "merge.yaml").read_text())["merge_method"] == "sce"


def test_tokenizer_of_another_model(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches `tokenizer.source` that is read and not followed."""
    merge(recipe(family, tokenizer={"source": str(family["b"])}), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"of": "b"}


def test_of_the_tokenizers_model_no_weights_are_downloaded(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hundreds of gigabytes for one tokenizer.json."""
    import huggingface_hub

    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.extend((name, *allow_patterns))
        return str(family["b"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    merge(recipe(family, tokenizer={"source": "owner/70B"}), tmp_path / "out")
    assert asked[0] == "owner/70B"
    assert "*.json" in asked
    assert "*.safetensors" not in asked


@pytest.mark.parametrize("method", ["sce", "linear"])
def test_threads_and_shards_do_not_change_a_bit(family: dict[str, Path], tmp_path: Path, method: str) -> None:
    """Catches results that depend on how the work is cut."""
    merge(recipe(family, method), tmp_path / "one", threads=1)
    merge(recipe(family, method), tmp_path / "many", threads=4, max_shard_bytes=2000)
    one, many = read_all(tmp_path / "one"), read_all(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert one.keys() == many.keys()
    for name, values in one.items():
        assert values.tobytes() == many[name].tobytes()


def test_integer_and_bool_buffers_are_copied_if_equal(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches buffers that are averaged, dropped, or taken from one model while they differ."""
    for name, path in family.items():
        tensors = read_all(path) | {"steps": np.arange(5), "flags": np.array([True, False])}
        write_model(tmp_path / f"{name}2", tensors)
    again = {name: tmp_path / f"{name}2" for name in family}
    merge(recipe(again), tmp_path / "out")
    assert read_all(tmp_path / "out")["steps"].tolist() == [0, 1, 2, 3, 4]
    write_model(again["b"], read_all(family["b"]) | {"steps": np.arange(1, 6), "flags": np.array([True, False])})
    with pytest.raises(DataError, match=r"steps.*cannot be merged and differs"):
        merge(recipe(again), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_buffers_are_copied_piece_by_piece(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a buffer of more than 2 GiB, which is more than one read gives, that is cut short silently."""
    again = {name: write_model(tmp_path / f"{name}2", read_all(path) | {"steps": np.arange(99)})
             for name, path in family.items()}  # fmt: skip
    monkeypatch.setattr(tensor, "COPY_BYTES", 64)
    merge(recipe(again), tmp_path / "out")
    assert read_all(tmp_path / "out")["steps"].tolist() == list(range(99))
    last = np.arange(99)
    last[98] = 0
    write_model(again["b"], read_all(family["b"]) | {"steps": last})
    with pytest.raises(DataError, match=r"steps.*cannot be merged and differs"):
        merge(recipe(again), tmp_path / "bad")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, n, at)[:50])
    with pytest.raises(FormatError, match="'steps' is cut short"):
        merge(recipe(again), tmp_path / "bad")


def test_models_that_do_not_fit_are_refused_before_anything_is_written(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches late errors: a missing, an extra, a misshapen tensor, another vocabulary, another number of layers."""
    good = read_all(family["b"])
    q = "model.layers.1.self_attn.q_proj.weight"
    for tensors, message in [
        ({k: v for k, v in good.items() if k != q}, f"has no tensor {q}"),
        (good | {"model.layers.2.x": good[q]}, "has a tensor model.layers.2.x the base"),
        (good | {q: good[q][:8]}, "different shapes"),
        (good | {q: good[q].reshape(256)}, "different shapes"),
        (good | {q: np.zeros((16, 16), np.int64)}, "only float32, float16, bfloat16"),
    ]:
        write_model(family["b"], tensors)
        with pytest.raises(DataError, match=message):
            merge(recipe(family), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    wide = good | {n: np.zeros((48, 16), np.float32) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    write_model(family["b"], wide, config={"vocab_size": 48})
    with pytest.raises(DataError, match=r"48 rows of vocabulary, the base .* 40: set `vocab: base`"):
        merge(recipe(family), tmp_path / "out")


def test_nonfinite_is_refused_with_file_tensor_and_element(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches NaN that reaches the output, or an error that does not say where it came from."""
    tensors = read_all(family["a"])
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan
    write_model(family["a"], tensors, shards=3)
    with pytest.raises(DataError, match=r"a/model-0000\d-of-00003.safetensors.*up_proj.weight.*1 values.*\[3, 5\]"):
        merge(recipe(family), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(recipe(family), tmp_path / "out", allow_nonfinite=True)
    merged = read_all(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]
    assert merged[3, 5] == read_all(family["base"])["model.layers.0.mlp.up_proj.weight"][3, 5]


def test_overflow_of_the_output_dtype_is_refused(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a silent infinity."""
    for path in family.values():
        tensors = {name: values.astype(np.float32) for name, values in read_all(path).items()}
        tensors["model.norm.weight"][0] = 1e6
        write_model(path, tensors, shards=3 if path.name == "a" else 1)
    with pytest.raises(DataError, match=r"model\.norm\.weight: 1 merged values exceed F16"):
        merge(recipe(family, parameters={"variant": "fuseai"}, out_dtype="float16"), tmp_path / "out")


def test_verify_sees_every_change(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches checksums of the wrong files, or none."""
    out = tmp_path / "out"
    merge(recipe(family), out)
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (out / "model.safetensors").write_bytes(bytes(raw))
    with pytest.raises(FormatError, match=r"model\.safetensors has changed"):
        verify(out)
    (out / "model.safetensors").write_bytes(bytes(raw[:-1]))
    with pytest.raises(FormatError, match="bytes instead of"):
        verify(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="is missing"):
        verify(out)
    with pytest.raises(FormatError):
        verify(family["base"])


def test_full_disk_is_one_line_and_leaves_no_model(family: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """Catches a merge that begins what the disk cannot hold."""
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(FusechatError, match="free space"):
        merge(recipe(family), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    enough = merge(recipe(family), tmp_path / "out", dry_run=True)["output_bytes"]  # but for the tokenizer
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(enough, 0, enough))
    with pytest.raises(FusechatError, match="free space"):
        merge(recipe(family), tmp_path / "out")


def test_a_disk_that_is_full_at_the_last_file_is_one_line(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback after hours of work, for a tokenizer that did not fit any more."""
    real = output.shutil.copyfile

    def full(path: Path, to: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(to))

    monkeypatch.setattr(output.shutil, "copyfile", full)
    with pytest.raises(FusechatError, match=r"out\.partial failed: .*No space left on device"):
        merge(recipe(family), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(output.shutil, "copyfile", real)
    merge(recipe(family), tmp_path / "out", resume=True)
    assert verify(tmp_path / "out") > 5


def test_a_place_that_cannot_be_is_one_line(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a traceback for an output below a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(FusechatError, match=r"cannot write .*file/out\.partial: .*; choose another place"):
        merge(recipe(family), tmp_path / "file" / "out")


def test_dry_run_writes_nothing(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches side effects and wrong sums."""
    needs = merge(recipe(family), tmp_path / "out", dry_run=True)
    n = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert needs["n_elements"] == n
    assert not list(tmp_path.glob("out*"))
    merge(recipe(family), tmp_path / "real")
    assert needs["output_bytes"] == (tmp_path / "real" / "model.safetensors").stat().st_size
    with pytest.raises(ConfigError, match="too little: this merge needs"):
        merge(recipe(family), tmp_path / "out", max_memory_bytes=1_000_000)


def test_the_memory_of_slerp_holds_both_models(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a bound that forgets the base, which slerp hands to the engine as a model like the other."""
    monkeypatch.setattr(estimate, "resident_bytes", lambda: 0)
    one = {name: family[name] for name in ("base", "a")}
    two = {name: family[name] for name in ("base", "a", "b")}
    slerp = recipe(one, "slerp", parameters={"t": 0.5})
    needs = [merge(config, tmp_path / "out", threads=2, dry_run=True) for config in (slerp, recipe(two, "linear"))]
    assert needs[0]["memory_bytes"] == needs[1]["memory_bytes"]
    with pytest.raises(ConfigError, match="too little"):
        merge(slerp, tmp_path / "out", threads=1, max_memory_bytes=estimate.engine_bytes(1, 1))


def test_merging_loads_no_torch(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches an import that costs seconds and hundreds of megabytes."""
    code = (
        "import sys, yaml; from pathlib import Path; from fusechat.merge import merge;"
        "merge(yaml.safe_load(sys.argv[1]), Path(sys.argv[2]));"
        "print([m for m in ('torch', 'transformers', 'safetensors', 'numba') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, yaml.safe_dump(recipe(family)), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_targets_of_different_pivots_are_refused(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a merge of updates that start from different weights; a target that says nothing passes."""
    names = [name for name in family if name != "base"]
    for name, pivot in zip(names[:2], ("a" * 64, "b" * 64)):
        (family[name] / "provenance.json").write_text(json.dumps({"request": {"pivot_sha256": pivot}}))
    with pytest.raises(MismatchError, match="were trained from different pivots"):
        merge(recipe(family), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    (family[names[1]] / "provenance.json").write_text(json.dumps({"request": {"pivot_sha256": "a" * 64}}))
    merge(recipe(family), tmp_path / "out")
