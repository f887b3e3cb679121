"""Where targets come from: those that fusechat trained say which pivot they started from."""

from __future__ import annotations

from collections.abc import Sequence

from fusechat.artifact import read_json
from fusechat.errors import MismatchError
from fusechat.merge.inputs import Model

PROVENANCE = "provenance.json"


def check_lineage(targets: Sequence[Model]) -> None:
    """Raise MismatchError, naming both, when two targets were trained from different pivots.

    A target that says nothing, such as one trained elsewhere, passes: shapes are all that can be compared then.
    """
    known: tuple[Model, str] | None = None
    for target in targets:
        path = target.checkpoint.directory / PROVENANCE
        if not path.exists():
            continue
        provenance = read_json(path)
        request = provenance.get("request") if isinstance(provenance, dict) else None
        pivot = request.get("pivot_sha256") if isinstance(request, dict) else None
        if not isinstance(pivot, str):
            continue
        if known is None:
            known = target, pivot
        elif known[1] != pivot:
            raise MismatchError(
                f"{known[0].ref} and {target.ref} were trained from different pivots ({known[1][:12]}… and "
                f"{pivot[:12]}…): their updates do not belong together; train both from one pivot"
            )
