"""How well it aligned: kinds of rows, mass kept, worst tokens, and dialogues in both tokenizations, by source."""

from __future__ import annotations

from fusechat.align import read_coverage
from fusechat.artifact import MANIFEST, Json, read_manifest
from fusechat.errors import FormatError, FusechatError
from fusechat.layout import Layout
from fusechat.report.names import source_names
from fusechat.report.sample import Tokenizations
from fusechat.store import ALIGNED_FORMAT
from fusechat.twins import are_twins

MAX_SEGMENTS = 1200
_CHOICES = ("tokens", "vocab", "granularity", "unaligned", "collisions")


def alignment(layout: Layout, config: Json) -> Json:
    """Return every source's coverage and sampled dialogues, and the sources that need no alignment, their tokens being
    the pivot's; raises FormatError when no source is aligned."""
    names = source_names(config)
    found: dict[str, Json] = {}
    for name in names:
        if not (layout.aligned(name) / MANIFEST).exists():
            continue
        manifest = read_manifest(layout.aligned(name), ALIGNED_FORMAT)
        report = read_coverage(layout.aligned(name))
        found[name] = {
            "choices": {key: manifest.get(key) for key in _CHOICES},
            **{key: report[key] for key in ("rows", "n_rows", "mass", "mass_by_kind", "lost_tokens")},
        }
    twins = [n for n in names if n not in found and are_twins(layout.store("pivot"), layout.store(n))]
    if not found and not twins:
        raise FormatError(f"no source is aligned yet: {layout.aligned('*')} is not there")
    for name, source in found.items():
        try:
            sample = Tokenizations.open(layout.store("pivot"), layout.store(name), layout.aligned(name))
            source["dialogues"] = sample.dialogues(max_segments=MAX_SEGMENTS // len(found))
        except FusechatError as error:
            # The coverage stands without the tokenizers; they may have moved since.
            source["dialogues"] = {"missing": str(error)}
    absent = [name for name in names if name not in found and name not in twins]
    return {"by_source": found, "twins": twins, "absent": absent}
