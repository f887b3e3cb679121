"""Profiles: a trace read back as numbers, perf's report, the compile-time table, and the command on a small model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TinyWorld
from rich.console import Console
from typer.testing import CliRunner

from fusechat.cli import app
from fusechat.errors import ConfigError, MismatchError
from fusechat.profile.native import Function, by_room, parse_report
from fusechat.profile.report import stage_report, what_it_did
from fusechat.profile.summary import OUTSIDE, summarise, table
from fusechat.profile.trace import Operator, memory_timeline, read_operators

F32 = "float"


def event(name: str, ts: float, dur: float, dims: list[Any] | None = None, kinds: list[str] | None = None) -> Any:
    args = {} if dims is None else {"Input Dims": dims, "Input type": kinds or [F32] * len(dims)}
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


def write(tmp_path: Path, events: list[Any]) -> Path:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def test_own_time_bytes_and_flops_of_a_trace(tmp_path: Path) -> None:
    trace = write(
        tmp_path,
        [
            event("aten::linear", 0, 100, [[8, 16], [16, 32]]),
            event("aten::mm", 10, 60, [[8, 16], [16, 32]]),
            event("aten::t", 72, 8, [[32, 16]]),
            event("aten::mm", 200, 40, [[8, 16], [16, 32]]),
            event("aten::add_", 300, 10, [[4, 4], [4, 4], []], [F32, F32, "Scalar"]),
            event("aten::relu", 320, 10, [[4, 4]], ["c10::BFloat16"]),
            {"ph": "i", "name": "[memory]", "ts": 5, "args": {"Total Allocated": 10}},
            {"ph": "i", "name": "[memory]", "ts": 1_000_005, "args": {"Total Allocated": 70}},
        ],
    )
    found = {operator.name: operator for operator in read_operators(trace)}
    assert found["mm"].calls == 2
    assert found["mm"].seconds == pytest.approx(100e-6)
    assert found["mm"].n_flops == 2 * 2 * 8 * 16 * 32
    assert found["mm"].n_bytes == 2 * 4 * (8 * 16 + 16 * 32 + 8 * 32)
    assert found["linear"].seconds == pytest.approx(32e-6), "without mm and t inside it"
    assert found["t"].n_bytes == 0
    assert found["linear"].n_bytes == 0, "mm has moved them"
    assert found["add_"].n_bytes == 2 * 16 * 4, "written in place: no third tensor"
    assert found["relu"].n_bytes == 2 * 16 * 2
    assert memory_timeline(trace) == [(0.0, 10), (1.0, 70)]


def test_gpu_kernels_belong_to_what_launched_them(tmp_path: Path) -> None:
    launcher = event("aten::mm", 0, 5, [[8, 16], [16, 32]])
    launcher["args"]["External id"] = 7
    kernel = {
        "ph": "X", "cat": "kernel", "name": "gemm<float>", "ts": 50, "dur": 20, "tid": 9, "args": {"External id": 7},
    }  # fmt: skip
    (only,) = read_operators(write(tmp_path, [launcher, kernel]))
    assert (only.name, only.seconds) == ("gemm", pytest.approx(20e-6))
    assert only.n_bytes is not None


def test_the_summary_says_which_roof_is_near(tmp_path: Path) -> None:
    operators = read_operators(
        write(
            tmp_path,
            [
                event("aten::mm", 0, 1000, [[100, 1000], [1000, 100]]),  # 20 MFLOP in 1 ms: 20 GFLOP/s
                event("aten::copy_", 2000, 1000, [[1000, 1000], [1000, 1000]]),  # 8 MB in 1 ms: 8 GB/s
                event("custom", 4000, 1000),
                *(event("aten::mul", 6000 + 100 * i, 60, [[8, 8], [8, 8]]) for i in range(101)),
                *(event("aten::empty", 20_000 + 100 * i, 60) for i in range(101)),
            ],
        )
    )
    ceilings = {"copy_gb_s": 10.0, "gemm_float32_gflop_s": 100.0, "gemm_bfloat16_gflop_s": 400.0}
    lines = {line.operator.name: line for line in summarise(operators, ceilings, "float32")}
    assert lines["mm"].ceiling == pytest.approx(0.2)
    assert lines["mm"].advice == "larger shapes"
    assert lines["copy_"].ceiling == pytest.approx(0.8)
    assert lines["copy_"].advice == "fuse"
    assert (lines["custom"].ceiling, lines["custom"].advice) == (None, "see the trace")
    # 60 µs each, of which the memory needs a tenth of one: not its strides are slow.
    assert lines["mul"].advice == lines["empty"].advice == "batch calls"
    assert sum(line.share for line in lines.values()) == pytest.approx(1)
    assert table(list(lines.values())).row_count == 5


def test_the_table_fits_eighty_columns_and_cuts_no_figure() -> None:
    long = "_scaled_dot_product_flash_attention_for_cpu_backward"
    operators = [
        Operator(name=OUTSIDE, calls=1, seconds=2.0, n_bytes=None, n_flops=0.0),
        Operator(name=long, calls=12_345, seconds=1.0, n_bytes=123.4e9, n_flops=98.7654e12),
        Operator(name="to_copy", calls=99_999, seconds=1.0, n_bytes=4e3, n_flops=0.0),
    ]
    ceilings = {"copy_gb_s": 10.0, "gemm_float32_gflop_s": 100.0}
    out = io.StringIO()
    Console(file=out, width=80).print(table(summarise(operators, ceilings, "float32")))
    header, *rows = out.getvalue().splitlines()
    assert header.split() == ["operator", "time", "calls", "MB", "GFLOP", "GB/s", "GFLOP/s", "roof", "next"]
    assert [row.split()[2:5] for row in rows[1:]] == [["12345", "123k", "98765"], ["99999", "<0.01", "–"]]
    assert rows[0].split() == ["outside", "operators", "50.0%", *"–––––", "–", "functions", "below"]


def test_perf_s_report_is_read() -> None:
    report = """# comment
    50.91%  libblas.so.0             [.] dgemm_kernel
     5.48%  [kernel.kallsyms]        [k] clear_page_erms
     3.10%  _native.so               [.] fusechat::merge::pass(float const*, unsigned long)
     2.10%  libtorch_cpu.so          [.] at::native::(anonymous namespace)::copy_kernel(at::TensorIterator&)
"""
    found = parse_report(report)
    assert [(f.share, f.library, f.name) for f in found] == [
        (0.5091, "libblas.so.0", "dgemm_kernel"),
        (0.0548, "[kernel.kallsyms]", "clear_page_erms"),
        (0.031, "_native.so", "fusechat::merge::pass"),
        (0.021, "libtorch_cpu.so", "at::native::copy_kernel"),
    ]


def test_whose_code_the_time_is_in_and_what_a_call_moved() -> None:
    functions = [
        Function(share=share, library=library, name="f")
        for share, library in (
            (0.5, "_native.cpython-311.so"),
            (0.2, "libpython3.11.so.1.0"),
            (0.15, "[kernel.kallsyms]"),
        )
    ]
    assert by_room(functions) == {"engine": 0.5, "Python": 0.2, "kernel": 0.15}
    done = {
        "seconds": 0.5, "calls": 7, "read_bytes": 3_000_000_000, "written_bytes": 1_000_000_000,
        "amount": 2_000_000, "unit": "tokens",
    }  # fmt: skip
    text = what_it_did("align", done, 16.0)
    assert "500.0 ms a call, mean of 7; 4 M tokens/s" in text
    assert "8 GB/s, 50% of copying memory" in text
    assert max(len(line.replace("[bold]", "").replace("[/bold]", "")) for line in text.splitlines()) <= 80


def config_of(world: TinyWorld, folder: Path) -> Path:
    path = folder / "fusion.yaml"
    values = {
        "pivot": str(world.pivot), "sources": [{"model": str(world.source)}], "data": {"train": str(world.dialogues)},
        "out": str(folder / "run"), "train": {"batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_training_step_is_profiled(tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusechat.profile import report

    # What a run has held-out dialogues for, a piece does without.
    chosen = ["train.final=best", f"data.validation={tiny_world.dialogues}"]
    # perf would run the stage a second time; `merge` below has it.
    monkeypatch.setattr(report, "profile_native", lambda *_: ("no perf in this test", {}))
    out = tmp_path / "profile"
    done = CliRunner().invoke(
        app,
        ["profile", "train", str(config_of(tiny_world, tmp_path)), *chosen, "--out", str(out), "--dialogues", "8"],
    )
    assert done.exit_code == 0, done.output
    assert "no perf in this test" in done.output
    facts = json.loads((out / "summary.json").read_text())
    assert facts["peak_tensor_bytes"] > 0
    assert sum(line["share"] for line in facts["operators"]) > 0.3
    shares = {line["operator"]["name"]: line["share"] for line in facts["operators"]}
    assert shares["outside operators"] > 0, "what torch sees is not taken for the whole"
    products = [operator for operator in read_operators(out / "trace.json") if operator.name == "mm"]
    assert products[0].n_flops > 0
    assert facts["ncu"].startswith("ncu --nvtx")
    assert (out / "memory.csv").read_text().startswith("seconds,bytes\n0.0")
    assert not (tmp_path / "run").exists(), "a profile leaves the run's folder alone"


def test_extraction_is_seen_where_a_run_gives_it_to_a_child(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with a GPU: the products must be in this process's trace."""
    from fusechat.config import load_config
    from fusechat.extract import backend
    from fusechat.profile.stage import profile_torch

    monkeypatch.setattr(backend, "visible_devices", lambda: ["0"])
    profile_torch("extract", load_config(config_of(tiny_world, tmp_path)), tmp_path, 4)
    assert any(operator.n_flops for operator in read_operators(tmp_path / "trace.json"))


def test_compiled_functions_of_a_merge(tiny_world: TinyWorld, tmp_path: Path) -> None:
    out = tmp_path / "profile"
    done = CliRunner().invoke(app, ["profile", "merge", str(config_of(tiny_world, tmp_path)), "--out", str(out)])
    assert done.exit_code == 0, done.output
    facts = json.loads((out / "summary.json").read_text())
    assert facts["calls"] >= 1
    assert facts["read_bytes"] > facts["written_bytes"] > 0
    functions = facts["functions"]
    if isinstance(functions, str):
        assert "perf" in functions
    else:
        assert 0 < sum(function["share"] for function in functions) <= 1.01


def test_the_merge_of_all_sources_target_is_the_one_that_is_profiled(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """Catches a profile of an SCE over targets that a run of `mode: multi` never has."""
    from fusechat.config import load_config
    from fusechat.profile.piece import prepare

    config = load_config(config_of(tiny_world, tmp_path), ["train.mode=multi"])
    piece = prepare("merge", config, tmp_path / "piece", 4)
    assert [place.name for place in piece.reads] == ["pivot", "multi"]
    made = piece.run(tmp_path / "merged")
    assert (made["method"], len(made["targets"])) == ("linear", 1)


def test_what_is_wrong_is_said(tiny_world: TinyWorld, tmp_path: Path) -> None:
    def fails(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["profile", *arguments])
        assert isinstance(done.exception, (ConfigError, MismatchError)), done.output
        return str(done.exception)

    path = str(config_of(tiny_world, tmp_path))
    assert "needs the YAML" in fails("merge")
    assert "there are extract, align, train, merge and kernels" in fails("teach", path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "thesis.tex" in fails("merge", path, "--out", str(tmp_path / "mine"))
    pytest.importorskip("triton", reason="Triton is not installed")
    assert "unknown architecture 'sm_91'" in fails("kernels", "--arch", "sm_91")


def test_occupancy_counts_registers_warps_and_shared_memory() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from fusechat.profile.compiled import Resources, blocks_per_sm, occupancy, parse_arch

    def use(registers: int, shared_bytes: int = 0) -> Resources:
        return Resources(registers=registers, spills=0, shared_bytes=shared_bytes, wide_loads=1, exponentials=1)

    assert blocks_per_sm(use(32), 8, 90) == 8  # 64 warps
    assert blocks_per_sm(use(128), 8, 90) == 2  # 65,536 registers
    assert blocks_per_sm(use(33), 16, 90) == 3  # rounded up to 40 a thread
    assert blocks_per_sm(use(32, 100_000), 4, 90) == 2  # 228 KiB
    assert occupancy(use(128), 8, 90) == 0.25
    assert occupancy(use(255), 32, 90) == 0.0, "such a program cannot start"
    assert (parse_arch("sm_90a"), parse_arch("80"), parse_arch("gfx942")) == (90, 80, "gfx942")


def test_a_recipe_stands_in_the_current_folder_as_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches targets of an earlier run looked for beside the installed package."""
    found: list[str] = []

    def profile_torch(stage: str, settings: Any, *_: Any) -> None:
        found.append(settings.out)
        raise ConfigError("seen")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fusechat.profile.report.profile_torch", profile_torch)
    with pytest.raises(ConfigError, match="seen"):
        stage_report("extract", "recipe:stories", [], tmp_path / "profile", 4, Console())
    assert found == [str(tmp_path / "runs" / "stories")]
