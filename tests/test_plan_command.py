"""The command: what it prints, offline and without torch, for which hardware, and the pages that quote it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fusechat.cli import app
from fusechat.config import RunConfig
from fusechat.errors import ConfigError, DataError
from fusechat.plan import plan
from fusechat.plan.hardware import Hardware, load_hardware
from fusechat.plan.projection import papers_config
from fusechat.plan.report import print_plan
from fusechat.plan.training import launch_words


@pytest.fixture(scope="module")
def paper() -> RunConfig:
    return papers_config()


@pytest.mark.parametrize("name", ["a100-40", "rtx4090"])
def test_the_table_fits_80_columns(paper: RunConfig, name: str) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_plan(plan(paper, load_hardware(name), disk_limit_bytes=10**9), console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert not any(line.strip() == "\\" for line in text.splitlines()), "a command that ends too early"
    for word in ("internlm", "the disk is too small", "fits", "GB", "max_num_batched_tokens", "launched by"):
        assert word in text


def test_a_name_with_brackets_is_printed_as_it_is(paper: RunConfig) -> None:
    """Catches names taken for the terminal's markup, which `[/x]` even ends the command with."""
    sources = [source.model_copy(update={"name": name}) for source, name in zip(paper.sources, ("[/x]", "[red]y"))]
    tiny = load_hardware("a100-40", memory_bytes=1)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_plan(plan(paper.model_copy(update={"sources": sources}), tiny), console)
    rows = [line.split()[:2] for line in console.export_text().splitlines()]
    assert ["extract", "[/x]"] in rows
    assert ["train", "[red]y"] in rows


def test_the_command_prints_json_offline() -> None:
    done = CliRunner().invoke(
        app, ["plan", "recipe:fusechat_7b_v2", "--hardware", "a100-80", "--gpus", "4", "--json", "-"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["devices"] == 4
    assert len(found["stages"]) == 6 + 5 + 6 + 1 + 1
    first = found["stages"][0]
    assert first["device_bytes"] == sum(first["device_parts"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe:fusechat_7b_v3"], "did you mean `fusechat_7b_v2`"),
        (["recipe:fusechat_7b_v2", "--hardware", "h20"], "did you mean `h200`"),
        (["recipe:fusechat_7b_v2", "--gpus", "2", "--hardware", "cpu"], "--gpus has no meaning"),
        (["recipe:fusechat_7b_v2", "--gpus", "2"], "--gpu-memory 40GB, or --hardware"),
        (["recipe:fusechat_7b_v2", "--hardware", "h200", "--gpu-memory", "much"], "is no size"),
        (["recipe:fusechat_7b_v2", "pivot=./nowhere", "--hardware", "h200"], "does not exist"),
        (["nowhere.yaml"], "cannot read nowhere.yaml"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], message: str, gpus: Any) -> None:
    gpus()
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(done.exception, (ConfigError, DataError))
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_the_gpus_that_are_here_are_what_is_planned_for(gpus: Any) -> None:
    """Catches a plan for the CPU of a machine that has GPUs, and one for GPUs that are hidden."""

    def planned(*options: str) -> tuple[dict[str, Any], str]:
        done = CliRunner().invoke(app, ["plan", "recipe:fusechat_7b_v2", "--json", "-", *options])
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        return found, "; ".join(found["assumptions"])

    gpus("NVIDIA H200", "NVIDIA H200", mebibytes=143_771)
    found, assumed = planned()
    assert (found["hardware"], found["devices"], found["device_memory_bytes"]) == ("NVIDIA H200", 2, 143_771 << 20)
    assert "speed and disk as of h200;" in assumed
    assert "989 TFLOP/s" in assumed
    gpus("Unheard Of 3000", mebibytes=40_000)
    assert "as of a100-40, the known GPU nearest in memory" in planned()[1]
    gpus()
    found, assumed = planned("--gpus", "8", "--gpu-memory", "80GB")
    assert (found["devices"], found["device_memory_bytes"]) == (8, 80 * 10**9)
    assert "as of a100-80, the known GPU" in assumed  # the slower of two
    assert planned("--gpu-memory", "80GB")[0]["devices"] == 1


@pytest.mark.parametrize(
    ("strategy", "gpus", "dtype", "words"),
    [
        ("ddp", 1, "bfloat16", "fusechat run"),
        ("ddp", 4, "float32", "torchrun --nproc-per-node 4 -m fusechat run"),
        ("fsdp2", 8, "bfloat16", "accelerate-fsdp2.yaml --num_processes 8 -m fusechat run"),
        ("fsdp2+offload", 2, "float32", "accelerate-fsdp2-offload.yaml --num_processes 2 --mixed_precision no -m"),
    ],
)
def test_the_launch_line_is_of_the_strategy(strategy: str, gpus: int, dtype: str, words: str) -> None:
    line = launch_words(strategy, gpus, dtype)
    assert words in line
    for file in re.findall(r"\S+\.yaml", line):
        assert (Path(__file__).resolve().parents[1] / file).exists()


def test_a_plan_is_made_without_torch() -> None:
    """Catches an import of torch, which takes longer than all the rest, for a few numbers."""
    code = (
        "import sys, fusechat.plan.report\nfrom fusechat.plan import plan, projection, hardware\n"
        "plan(projection.papers_config(), hardware.load_hardware('a100-40'))\nprint('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_the_printed_plan_of_the_docs_is_the_command_s(paper: RunConfig) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_plan(plan(paper, load_hardware("a100-40"), disk_limit_bytes=2 * 10**12), console)
    printed = "\n".join(line.rstrip() for line in console.export_text().splitlines())
    page = (Path(__file__).resolve().parents[1] / "docs" / "plan.md").read_text(encoding="utf-8")
    assert f"```text\n{printed}\n```" in page, f"docs/plan.md is stale: the command above it prints\n{printed}"


def test_the_projection_of_the_docs_is_the_plan_s() -> None:
    from fusechat.plan.projection import authors_utilisation, markdown

    page = (Path(__file__).resolve().parents[1] / "docs" / "plan.md").read_text(encoding="utf-8")
    assert markdown() in page, "docs/plan.md is stale: python -m fusechat.plan.projection prints what belongs there"
    real, padded = authors_utilisation(papers_config())
    assert f"{padded:.0%}".replace("%", " %") in page
    assert f"{real:.0%}".replace("%", " %") in page


def test_a_file_describes_hardware(tmp_path: Path) -> None:
    facts = {
        "device": "cuda", "memory": "24GiB", "host_memory": "64GB", "devices": 3,
        "tflops": {"bfloat16": 100, "float32": 50}, "disk_rate": "2GB", "efficiency": {"extract": 0.5, "train": 0.4},
    }  # fmt: skip
    path = tmp_path / "box.json"
    path.write_text(json.dumps(facts))
    box = load_hardware(str(path))
    assert isinstance(box, Hardware)
    assert box.memory_bytes == 24 * 2**30
    assert box.rate("train", "bfloat16") == pytest.approx(40e12)
    for broken, message in (
        ({"memry": "1GB"}, "did you mean `memory`"),
        ({"devices": None}, "devices is None"),
        ({"devices": 0.5}, "devices is 0.5, expected a whole number"),
        ({"device": "tpu"}, "device is 'tpu', expected cuda or cpu"),
        ({"tflops": {"bfloat16": float("inf"), "float32": 1}}, "tflops.bfloat16 is inf"),
        ({"efficiency": {"extract": 40, "train": 0.4}}, "efficiency.extract is 40, expected a share"),
        ({"tflops": {"bfloat16": 1}}, "tflops must be a mapping with bfloat16 and float32"),
    ):
        path.write_text(json.dumps({**facts, **broken}).replace("Infinity", ".inf"))
        with pytest.raises(ConfigError, match=message):
            load_hardware(str(path))
    path.write_text("{")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_hardware(str(path))
