"""fusechat merge on the command line: what it prints, refuses, and leaves."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from merge_family import make_family, recipe

from fusechat.__main__ import main

ROOT = Path(__file__).resolve().parents[1]


def fusechat(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(
        [sys.executable, "-m", "fusechat", "merge", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A merge of three models as a file."""
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(recipe(make_family(tmp_path))))
    return path


def test_dry_run_merge_report_verify(config: Path, tmp_path: Path) -> None:
    """Catches an option that is read and not followed."""
    out = tmp_path / "out"
    dry = fusechat(config, out, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert re.search(r"memory\s+\d+", dry.stdout)
    assert not out.exists()
    done = fusechat(config, out, "--report", "--threads", 2, "--max-memory", "1GB", "--shard-size", "3kB")
    assert done.returncode == 0, done.stderr
    assert "model.layers.1.mlp.up_proj.weight" in done.stdout
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert "match their checksums" in fusechat("--verify", out).stdout
    (out / "config.json").write_text("{}")
    bad = fusechat("--verify", out)
    assert bad.returncode == 2
    assert "config.json has" in bad.stderr


def test_a_merge_loads_no_large_library(config: Path, tmp_path: Path) -> None:
    """Catches an import that takes longer, and more memory, than a small merge: pydantic came in with YAML."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['fusechat', 'merge', {str(config)!r}, {str(tmp_path / 'out')!r}]\n"
        "try: runpy.run_module('fusechat', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert (tmp_path / "out").exists()
    assert not {"torch", "transformers", "pydantic", "typer", "rich", "pyarrow", "numba"} & set(done.stdout.split())


def test_a_reader_that_ends_early_leaves_no_traceback(config: Path, tmp_path: Path) -> None:
    """Catches a broken pipe that is told as a fault of the merge, as with `--report | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fusechat", "merge", str(config), str(tmp_path / "out"), "--report"],
        stdout=writer, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    os.close(writer)
    assert (tmp_path / "out").exists()
    assert re.fullmatch(r"\d+ tensors in .*\n(warning: .*\n)*", done.stderr)


def test_another_pipe_that_breaks_is_not_taken_for_the_reader(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a fault that ends the command without a word: only who reads the output may go."""

    def broken(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("fusechat.commands.merge.merge", broken)
    monkeypatch.setattr(sys, "argv", ["fusechat", "merge", str(config), str(tmp_path / "out")])
    with pytest.raises(BrokenPipeError):
        main()


def test_errors_are_one_line_and_exit_2(config: Path, tmp_path: Path) -> None:
    """Catches tracebacks."""
    broken = tmp_path / "broken.yml"
    broken.write_text(config.read_text().replace("select_topk", "select_top_k"))
    for arguments, message in [
        ((broken, tmp_path / "out"), "did you mean `select_topk`"),
        ((config,), "needs CONFIG.yml and OUT"),
        ((config, tmp_path / "out", "--max-memory", "a lot"), "is no size"),
        ((config, tmp_path / "out", "--max-memory", "1MB"), "is too little"),
        (("--verify", tmp_path), "does not exist"),
        ((config, tmp_path / "out", "--verify", tmp_path), "--verify OUT merges nothing: leave out CONFIG"),
        (("--verify", tmp_path, "--report"), "--verify OUT merges nothing: leave out --report"),
        ((config, tmp_path / "out", "--dry-run", "--report"), "--report is of a merge that is made"),
        ((config, tmp_path / "out", "--sweep"), "--sweep needs --data"),
        ((config, tmp_path / "out", "--sweep", "--data", "x", "--dry-run"), "--dry-run is of one merge"),
        ((config, tmp_path / "out", "--sweep", "--data", "x", "--report"), "--report is of one merge"),
        ((config, tmp_path / "out", "--data", "x"), "--data is of a --sweep"),
        ((config, tmp_path / "out", "--format", "text"), "--format is of a --sweep"),
        ((config, tmp_path / "out", "--template", "plain"), "--template is of a --sweep"),
        ((config, tmp_path / "out", "--keep-all"), "--keep-all is of a --sweep"),
        (("recipe:merge-sec", tmp_path / "out"), "did you mean `merge-sce`?"),
        (("recipe:stories", tmp_path / "out"), "no recipe 'stories'"),
        ((config, tmp_path / "out", "--separator", "x"), "--separator is of a --sweep"),
        ((config, tmp_path / "out", "--max-bytes", "9"), "--max-bytes is of a --sweep"),
    ]:
        done = fusechat(*arguments)
        assert done.returncode == 2, done.stderr
        assert message in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "goes_on"),
    [
        ("run x.yaml", True),
        ("merge x.yaml out", True),
        ("eval answers m", True),
        ("eval bpb m", False),
        ("bench", False),
    ],
)
def test_an_interrupt_promises_to_go_on_only_where_work_is_kept(
    words: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a promise to whoever stops a benchmark."""

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fusechat.cli.app", stopped)
    monkeypatch.setattr("fusechat.commands.merge.merge", stopped)
    monkeypatch.setattr(sys, "argv", ["fusechat", *words.split()])
    with pytest.raises(SystemExit, match="130"):
        main()
    assert ("goes on where it stopped" in capsys.readouterr().err) == goes_on


def test_a_place_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback for a read-only folder, and one that is kept from whoever asks for it or needs it."""

    def ended_with(error: OSError, *more: str) -> str:
        def ends(*_: Any) -> None:
            raise error

        monkeypatch.setattr("fusechat.cli.app", ends)
        monkeypatch.setattr(sys, "argv", ["fusechat", "run", "x.yaml", *more])
        with pytest.raises(SystemExit, match="2"):
            main()
        return capsys.readouterr().err

    denied = PermissionError(errno.EACCES, "Permission denied", "/out/merged")
    assert ended_with(denied) == "fusechat: Permission denied: /out/merged (--debug shows where)\n"
    full = OSError(errno.ENOSPC, "No space left on device")
    assert ended_with(full) == "fusechat: No space left on device (--debug shows where)\n"
    with pytest.raises(PermissionError):
        ended_with(denied, "--debug")
    with pytest.raises(OSError, match="no file's"):
        ended_with(OSError("no file's: a mistake of the code"))
