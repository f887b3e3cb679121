"""Win rates of AlpacaEval annotations, raw and length-controlled, as the alpaca_eval package computes them."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusechat.artifact import Json
from fusechat.errors import DataError, FormatError
from fusechat.evaluate.alpaca import package, positions, preference, quietly
from fusechat.evaluate.bootstrap import SIGNIFICANCE, Ratio, comparison_table
from fusechat.evaluate.jackknife import N_GROUPS, Refitted, jackknife_table, without_groups


def win_rates(
    annotations: Mapping[str, Sequence[Json]],
    *,
    reference: Sequence[Json],
    gamed: Path | None = None,
    against: str | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return win rates in percent, length-controlled ones when `gamed` names df_gamed.csv, as JSON values.

    Figures are the package's. Intervals and paired differences of win rates are bootstraps over instructions; those of
    length-controlled rates are jackknives, for which the package's model is fitted again without each group of
    instructions (its own `lc_standard_error` takes the fit as known). `progress(fits_done, all_fits)`. Raises DataError
    for annotations against another reference.
    """
    alpaca_eval = package()
    against = next(iter(annotations)) if against is None else against
    models, ratios, frames = {}, {}, {}
    for name, rows in annotations.items():
        order = positions(rows, reference, name)
        if any(row["output_1"] != reference[n]["output"] for row, n in zip(rows, order, strict=True)):
            raise DataError(f"the annotations of {name} compare with other outputs than the reference's")
        frames[name] = _frame(rows, order)
        with quietly():
            found = alpaca_eval.metrics.get_winrate(frames[name])
        models[name] = {
            **_plain(found),
            "unparsable": int(sum(preference(row) is None for row in rows)),
            "avg_length": int(frames[name]["output_2"].str.len().mean()),
        }
        ratios[name] = _ratio(rows, order)
    table = comparison_table(
        {"overall": ratios}, value_name="win_rate", against=against, samples=samples, confidence=confidence, seed=seed
    )["overall"]
    models = {name: {**models[name], "interval": table[name]} for name in models}
    if gamed is not None:
        with _local_file(alpaca_eval, gamed, len(reference)):
            controlled = _length_controlled(alpaca_eval, frames, against, confidence, seed, progress)
        models = {name: models[name] | controlled[name] for name in models}
    return {"n_instructions": len(reference), "significance": SIGNIFICANCE, "models": models}


def _length_controlled(
    alpaca_eval: Any,
    frames: Mapping[str, Any],
    against: str,
    confidence: float,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, dict[str, Any]]:
    """Return by model the package's length-controlled figures and `length_controlled_interval`."""
    fits = itertools.count(1)

    def fitted(frame: Any) -> dict[str, Any]:
        with quietly():
            found = alpaca_eval.metrics.get_length_controlled_winrate(frame.copy(), save_weights_dir=None)
        if progress is not None:
            progress(next(fits), len(frames) * (N_GROUPS + 1))
        return _plain(found)

    def rate_without(frame: Any, instructions: npt.NDArray[np.int64]) -> float:
        return float(fitted(frame.iloc[instructions])["length_controlled_winrate"])

    whole = {name: fitted(frame) for name, frame in frames.items()}
    refitted = {
        name: Refitted(
            whole=whole[name]["length_controlled_winrate"],
            without=without_groups(functools.partial(rate_without, frame), len(frame), seed=seed),
        )
        for name, frame in frames.items()
    }
    table = jackknife_table(refitted, value_name="length_controlled_winrate", against=against, confidence=confidence)
    return {name: {**whole[name], "length_controlled_interval": table[name]} for name in frames}


def _ratio(rows: Sequence[Json], order: Sequence[int]) -> Ratio:
    won, judged = np.zeros(len(rows)), np.zeros(len(rows))
    for row, n in zip(rows, order, strict=True):
        value = preference(row)
        if value is not None:
            won[n], judged[n] = 100.0 * ((1.5 if value == 0 else value) - 1.0), 1.0
    return Ratio(numerator=won, denominator=judged)


def _frame(rows: Sequence[Json], order: Sequence[int]) -> Any:
    """Return annotations as the package's table, in the order and with the numbers of the official list."""
    import pandas as pd

    frame = pd.DataFrame(list(rows), index=order).sort_index()
    frame["preference"] = frame["preference"].astype(float)
    return frame


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    counts = ("n_wins", "n_wins_base", "n_draws", "n_total")
    return {key: int(value) if key in counts else float(value) for key, value in found.items()}


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
