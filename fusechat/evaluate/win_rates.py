"""Win rates of AlpacaEval annotations, raw and length-controlled, as the alpaca_eval package computes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusechat.artifact import Json
from fusechat.errors import DataError, FormatError
from fusechat.evaluate.alpaca import package, positions, preference, quietly
from fusechat.evaluate.bootstrap import SIGNIFICANCE, Ratio, comparison_table


def win_rates(
    annotations: Mapping[str, Sequence[Json]],
    *,
    reference: Sequence[Json],
    gamed: Path | None = None,
    against: str | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Return win rates in percent, length-controlled ones when `gamed` names df_gamed.csv, as JSON values.

    Figures are the package's; the intervals and the paired differences of win rates are bootstraps over instructions,
    and the interval of a length-controlled rate is ±1.96 of the package's standard errors. Raises DataError for
    annotations against another reference.
    """
    alpaca_eval = package()
    against = next(iter(annotations)) if against is None else against
    models, ratios = {}, {}
    for name, rows in annotations.items():
        order = positions(rows, reference, name)
        if any(row["output_1"] != reference[n]["output"] for row, n in zip(rows, order, strict=True)):
            raise DataError(f"the annotations of {name} compare with other outputs than the reference's")
        models[name] = _metrics(alpaca_eval, rows, order, gamed, n_official=len(reference))
        ratios[name] = _ratio(rows, order)
    table = comparison_table(
        {"overall": ratios}, value_name="win_rate", against=against, samples=samples, confidence=confidence, seed=seed
    )["overall"]
    return {
        "n_instructions": len(reference),
        "significance": SIGNIFICANCE,
        "models": {name: {**models[name], "interval": table[name]} for name in models},
    }


def _ratio(rows: Sequence[Json], order: Sequence[int]) -> Ratio:
    won, judged = np.zeros(len(rows)), np.zeros(len(rows))
    for row, n in zip(rows, order, strict=True):
        value = preference(row)
        if value is not None:
            won[n], judged[n] = 100.0 * ((1.5 if value == 0 else value) - 1.0), 1.0
    return Ratio(numerator=won, denominator=judged)


def _metrics(
    alpaca_eval: Any, rows: Sequence[Json], order: Sequence[int], gamed: Path | None, *, n_official: int
) -> dict[str, Any]:
    import pandas as pd

    frame = pd.DataFrame(list(rows), index=order).sort_index()
    frame["preference"] = frame["preference"].astype(float)
    unparsable = int(sum(preference(row) is None for row in rows))
    with quietly():
        if gamed is None:
            found = alpaca_eval.metrics.get_winrate(frame)
        else:
            with _local_file(alpaca_eval, gamed, n_official):
                found = alpaca_eval.metrics.get_length_controlled_winrate(frame, save_weights_dir=None)
    counts = ("n_wins", "n_wins_base", "n_draws", "n_total")
    return {
        **{key: int(value) if key in counts else float(value) for key, value in found.items()},
        "unparsable": unparsable,
        "avg_length": int(frame["output_2"].str.len().mean()),
    }


@contextlib.contextmanager
def _local_file(alpaca_eval: Any, gamed: Path, n_official: int) -> Iterator[None]:
    """Give the package the local df_gamed.csv where it would download one."""
    import pandas as pd

    try:
        known = pd.read_csv(gamed)["index"].nunique()
    except (OSError, KeyError, ValueError) as error:
        raise FormatError(f"{gamed} is no df_gamed.csv of AlpacaEval 2.0: {error}") from error
    if known != n_official:
        raise DataError(
            f"{gamed} knows {known} instructions and the reference has {n_official}: "
            "length control needs the whole official list, in its order"
        )
    module = alpaca_eval.metrics.glm_winrate
    original = module.hf_hub_download
    module.hf_hub_download = lambda **_: str(gamed)
    try:
        yield
    finally:
        module.hf_hub_download = original
