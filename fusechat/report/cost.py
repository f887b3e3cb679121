"""What it cost: seconds, rates, peak memory and bytes on disk, stage by stage."""

from __future__ import annotations

from pathlib import Path

from fusechat.artifact import Json, read_json
from fusechat.errors import FormatError
from fusechat.layout import SFT, Layout
from fusechat.ledger import read_ledger

_FUSION = ("extract", "align", "train", "merge")
_SFT = f"train {SFT}"


def cost(layout: Layout, config: Json) -> Json:
    """Return what each stage took, over all processes that worked on it; raises FormatError when nothing was noted."""
    lines = read_ledger(layout.ledger)
    stages: dict[str, Json] = {}
    for line in lines:
        stage = stages.setdefault(line["stage"], _nothing(line["stage"]))
        if line["event"] == "begin":
            stage["begun"] += 1
            continue
        stage["finished"] += 1
        for key in ("seconds", "cpu_seconds"):
            stage[key] += line[key]
        stage["unit"], stage["done"] = line["unit"], line["done"]
        for key in ("peak_memory_bytes", "peak_device_bytes"):
            stage[key] = max(filter(None, (stage[key], line.get(key))), default=None)
    if not stages:
        raise FormatError(f"{layout.ledger} is not there: this run was made before stages were timed")
    for name, stage in stages.items():
        # A rate is that of one uninterrupted process; what a killed one had done is not in the time.
        once = stage["begun"] == stage["finished"] == 1
        stage["rate"] = stage["done"] / stage["seconds"] if once and stage["seconds"] else None
        stage["interrupted"] = stage["begun"] - stage["finished"]
        stage["disk_bytes"] = _size_bytes(_place(layout, name))
    planned = _planned(layout)
    for name, stage in stages.items():
        kind, _, of = name.partition(" ")
        stage["planned"] = planned.get((kind, of))
    listed = list(stages.values())
    return {
        "stages": listed,
        "seconds": sum(stage["seconds"] for stage in listed),
        "fusion_seconds": sum(
            s["seconds"] for s in listed if s["name"].partition(" ")[0] in _FUSION and s["name"] != _SFT
        ),
        "sft_seconds": stages.get(_SFT, {}).get("seconds"),
        "cpu_seconds": sum(stage["cpu_seconds"] for stage in listed),
        "peak_memory_bytes": max(filter(None, (s["peak_memory_bytes"] for s in listed)), default=None),
        "peak_device_bytes": max(filter(None, (s["peak_device_bytes"] for s in listed)), default=None),
        "disk_bytes": sum(stage["disk_bytes"] or 0 for stage in listed),
        "interrupted": sum(stage["interrupted"] for stage in listed),
        "planned": bool(planned),
    }


def _planned(layout: Layout) -> dict[tuple[str, str], Json]:
    """Return what `fusechat plan CONFIG --json RUN/plan.json` said, by stage and model; nothing without that file."""
    if not layout.plan.exists():
        return {}
    return {
        # Merging and evaluating are one stage of a run, whatever the plan calls what they work on.
        (stage["stage"], "" if stage["stage"] in ("merge", "evaluate") else stage["name"]): {
            "seconds": stage["seconds"],
            "memory_bytes": stage["host_bytes"],
            "device_bytes": stage["device_bytes"],
            "disk_bytes": stage["disk_bytes"],
        }
        for stage in read_json(layout.plan)["stages"]
    }


def _nothing(name: str) -> Json:
    return {
        "name": name,
        "begun": 0,
        "finished": 0,
        "seconds": 0.0,
        "cpu_seconds": 0.0,
        "unit": "",
        "done": 0,
        "peak_memory_bytes": None,
        "peak_device_bytes": None,
    }


def _place(layout: Layout, stage: str) -> Path | None:
    kind, _, name = stage.partition(" ")
    places = {"extract": layout.store, "align": layout.aligned, "train": layout.target}
    if kind in places:
        return places[kind](name)
    return layout.merged if kind == "merge" else None


def _size_bytes(directory: Path | None) -> int | None:
    if directory is None or not directory.is_dir():
        return None
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
