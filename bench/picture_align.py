"""A picture of one dialogue's answer in two real tokenizations, and what each pivot row may teach.

    python bench/picture_align.py [--out docs/images/alignment.svg]

Real tokenizers are needed: ../shared/data, or the folder that FUSECHAT_SHARED_DATA names. The text is our own, because
none of the real dialogues there may be copied into the repository.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch, Patch

from fusechat.align.rows import RowKind, RowView, match_rows
from fusechat.align.tokenizer import light_vocabulary
from fusechat.bench.align import PIVOT, SOURCE, shared_data
from fusechat.bench.align_coverage import view

QUESTION = "How far away is the Moon?"
ANSWER = (
    "About 384400 kilometres, unbelievably: light needs 1.28 seconds.\n"
    "Internationally it is Луна, φεγγάρι or Mond; tokenizers disagree."
)
COLOURS = {RowKind.SAME: "#b7e0b0", RowKind.COARSER: "#aacbee", RowKind.FINER: "#fbd08a", RowKind.NONE: "#d9d9d9"}
SAID = {
    RowKind.SAME: "same: both end here",
    RowKind.COARSER: "coarser: the source's ends later",
    RowKind.FINER: "finer: the source's ends earlier",
    RowKind.NONE: "none: the source has no boundary before it",
}


def columns(text: bytes) -> np.ndarray:
    """Return the column of every byte offset; the bytes of one character share its column evenly."""
    widths = [len(character.encode()) for character in text.decode()]
    return np.append(0, np.cumsum(np.concatenate([np.full(w, 1 / w) for w in widths])))


def draw_side(axis: plt.Axes, side: RowView, top: float, text: bytes, where: np.ndarray, kinds: np.ndarray) -> None:
    """Draw one tokenization of the bytes that are in `axis`, a box a token."""
    line = text.index(b"\n")
    for row in range(len(side.gold)):
        start, end = int(side.starts[row]), int(side.ends[row])
        second = start > line
        left, right = (float(where[i]) - (second * (line + 1)) for i in (start, end))
        bottom = top - 5.2 * second
        colour = COLOURS[RowKind(int(kinds[row]))] if len(kinds) else "white"
        shape = {"boxstyle": "round,pad=0,rounding_size=0.12", "edgecolor": "#555555", "linewidth": 0.7}
        axis.add_patch(FancyBboxPatch((left + 0.06, bottom), right - left - 0.12, 1.0, facecolor=colour, **shape))
        word = text[start:end].decode("utf-8", "replace").replace(" ", "␣").replace("\n", "⏎")
        axis.text((left + right) / 2, bottom + 0.5, word, ha="center", va="center", fontsize=7.6, family="monospace")


def draw_bounds(axis: plt.Axes, pivot: RowView, source: RowView, text: bytes, where: np.ndarray) -> None:
    """Draw a line wherever both tokenizations have a boundary: before those the two models have read the same."""
    line = text.index(b"\n")
    for start in sorted(set(pivot.starts.tolist()) & set(source.starts.tolist())):
        second = start > line
        x = float(where[start]) - second * (line + 1)
        axis.plot([x, x], [1.05 - 5.2 * second, 1.95 - 5.2 * second], color="#333333", linewidth=0.9)


def main() -> int:
    """Draw the picture."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs/images/alignment.svg")
    chosen = options.parse_args()
    data = shared_data()
    if data is None:
        print("no real tokenizers here: set FUSECHAT_SHARED_DATA")
        return 2
    text = ANSWER.encode()
    sides = []
    for name in (PIVOT, SOURCE):
        vocabulary = light_vocabulary(data / "tokenizers" / name)
        sides.append(view(vocabulary, vocabulary.continuation_encoder()([ANSWER])[0], text))
    pivot, source = sides
    kinds = match_rows(pivot, source, np.array([0])).kind
    where = columns(text)
    # Text stays text, and two runs give the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "alignment"})
    figure, axis = plt.subplots(figsize=(11, 3.3))
    draw_side(axis, source, 2.0, text, where, np.empty(0))
    draw_side(axis, pivot, 0.0, text, where, kinds)
    draw_bounds(axis, pivot, source, text, where)
    for bottom in (0.0, -5.2):
        axis.text(-0.6, bottom + 2.5, f"source: {SOURCE}", ha="right", va="center", fontsize=8)
        axis.text(-0.6, bottom + 0.5, f"pivot: {PIVOT}", ha="right", va="center", fontsize=8)
    axis.text(0, 3.9, f"user: {QUESTION}     assistant:", fontsize=9, va="center")
    present = [kind for kind in RowKind if (kinds == kind).any()]
    axis.legend(
        handles=[Patch(facecolor=COLOURS[k], edgecolor="#555555", label=SAID[k]) for k in present],
        loc="upper center", bbox_to_anchor=(0.43, 0.06), ncols=4, fontsize=8, frameon=False,
    )  # fmt: skip
    axis.set_xlim(-14, 67)
    axis.set_ylim(-5.8, 4.4)
    axis.axis("off")
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(chosen.out, bbox_inches="tight", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
