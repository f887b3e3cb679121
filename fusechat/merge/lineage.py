"""Where targets come from: the pivot that those trained here started from, and whose tokens their rows are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fusechat.artifact import PROVENANCE, read_json
from fusechat.errors import FormatError, MismatchError
from fusechat.merge.inputs import Model

TOKENIZER = "tokenizer.json"


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


def tokens_that_differ(base: Model, others: Iterable[tuple[str, Path]]) -> str | None:
    """Return the first token that another model's tokenizer.json gives an id of the base's, in words, None if none.

    A model without a tokenizer.json says nothing of its tokens.
    """
    ours = base.checkpoint.directory / TOKENIZER
    if not ours.exists():
        return None
    content, known = ours.read_bytes(), None
    for name, directory in others:
        theirs = directory / TOKENIZER
        if not theirs.exists() or theirs.read_bytes() == content:
            continue
        known = known or _tokens(ours)
        for at, token in _tokens(theirs).items():
            if known.get(at, token) != token:
                return f"token {at} is {token!r} in {name} and {known[at]!r} in the base {base.ref}"
    return None


def _tokens(path: Path) -> dict[int, str]:
    definition = read_json(path)
    try:
        vocab = definition.get("model", {}).get("vocab") or {}
        listed = isinstance(vocab, list)  # Unigram's: pairs of a token and its score, in the order of the ids
        tokens = {i: pair[0] for i, pair in enumerate(vocab)} if listed else {at: token for token, at in vocab.items()}
        return tokens | {added["id"]: added["content"] for added in definition.get("added_tokens") or ()}
    except (AttributeError, TypeError, LookupError) as error:
        raise FormatError(f"{path} is no definition of a tokenizer: take the model's own file") from error
