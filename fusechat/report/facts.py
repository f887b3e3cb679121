"""Everything a report says, as JSON values: a section per question, each there or with the reason why not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fusechat import __version__
from fusechat.artifact import Json
from fusechat.config import short_name
from fusechat.errors import ConfigError, FormatError, FusechatError
from fusechat.layout import Layout
from fusechat.report.alignment import alignment
from fusechat.report.cost import cost
from fusechat.report.merging import merging
from fusechat.report.names import source_names
from fusechat.report.outcome import outcome
from fusechat.report.provenance import provenance
from fusechat.report.sources import sources
from fusechat.report.training import training
from fusechat.yaml_file import read_yaml

REPORT_FORMAT = "fusechat.report"
Section = Callable[[Layout, Json], Json]
SECTIONS: dict[str, Section] = {
    "outcome": outcome,
    "sources": sources,
    "alignment": alignment,
    "training": training,
    "merge": merging,
    "cost": cost,
    "provenance": provenance,
}


def gather(layout: Layout) -> Json:
    """Return the facts of a run's directory; raises ConfigError when it is none."""
    config = run_settings(layout)
    if config.get("stores") is not None:
        layout = replace(layout, stores=Path(str(config["stores"])))
    facts: Json = {
        "format": REPORT_FORMAT,
        "version": 1,
        "fusechat_version": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": layout.out.resolve().name,
        "pivot": short_name(str(config.get("pivot") or "")),
        "source_names": source_names(config),
    }
    for name, section in SECTIONS.items():
        facts[name] = _whole_or_missing(section, layout, config)
    cleaned: Json = finite(facts)
    return cleaned


def run_settings(layout: Layout) -> Json:
    """Return the settings of a run as they lie in its directory; raises ConfigError when it is none."""
    if not layout.config.is_file():
        raise ConfigError(
            f"{layout.out} is not the folder of a run: it has no {layout.config.name}; give the `out` of `fusechat run`"
        )
    config = read_yaml(layout.config)
    if not isinstance(config, dict):
        raise FormatError(f"{layout.config} is not the settings of a run")
    return config


def _whole_or_missing(section: Section, layout: Layout, config: Json) -> Json:
    try:
        return section(layout, config)
    except FusechatError as error:
        return {"missing": str(error)}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OSError) as error:
        # Whatever a file of another version or a damaged one does not hold, the other sections stand.
        return {"missing": f"what the run left cannot be read ({type(error).__name__}: {error})"}


def finite(value: Any) -> Any:
    """Return JSON values with NaN and infinities as None, which JSON and the charts know."""
    if isinstance(value, dict):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
