"""The benchmarks' instrument: pairing, verdicts, comparison with an old result, a table that fits a terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fusechat.bench.claims import Claim, Work, absent, at_least, at_most
from fusechat.bench.compare import worse
from fusechat.bench.report import peer_python, print_table, sizes
from fusechat.bench.roofline import plot_roofline
from fusechat.bench.suite import MODULES, run_benchmarks
from fusechat.bench.tables import headline_tables, load_results, pages, rewritten
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
    assert peer_python("mergekit-nobody-has", []) is None
    assert peer_python("mergekit", ["mergekit=/some/python"]) == "/some/python"
    assert peer_python("json", []) == sys.executable


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no benchmark 'los' on cpu; there are: align, "):
        run_benchmarks(["los"], "cpu", [])


def test_every_benchmark_of_the_suite_exists() -> None:
    missing = [name for name, module in MODULES.items() if not (ROOT / "bench" / f"{module}.py").exists()]
    assert not missing


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


def test_a_table_never_mixes_machines(tmp_path: Path) -> None:
    for name in ("one", "another"):
        claim = at_least("dtw, one pair, 2048 tokens", "plain Python", 1.0, None)
        result = _result(claim, cpu=name)
        result["claims"][0]["benchmark"] = "align"
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    text = headline_tables(load_results(tmp_path))
    assert [text.count(f"Measured on 2 × {name}:") for name in ("one", "another")] == [1, 1]
    assert text.count("| stage |") == 2


def test_a_page_without_markers_is_named() -> None:
    with pytest.raises(ValueError, match="headline"):
        rewritten("no markers here", "headline", "content")
