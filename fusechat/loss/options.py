"""The choices of the fusion loss, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from fusechat.errors import ConfigError

Divergence = Literal["ce", "kl", "reverse_kl", "jsd", "tvd", "skew_kl", "alpha"]
Missing = Literal["renormalise", "tail", "zero", "uniform"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """What does not differ from row to row; see `fusechat.loss.sparse_soft_ce` for the meaning of each
    field."""

    divergence: Divergence = "ce"
    """How far the student is from the teacher, over the teacher's K cells and the tail."""
    missing: Missing = "renormalise"
    """What becomes of the teacher's probability outside its K entries."""
    temperature: float = 1.0
    """Of the teacher."""
    student_temperature: float = 1.0
    """Of the student, in the soft term only."""
    beta: float = 0.5
    """The parameter of jsd, skew_kl and alpha."""
    label_smoothing: float = 0.0
    """Share of the hard target spread over the vocabulary."""
    z_loss: float = 0.0
    """Weight of lse² added to every row."""
    softcap: float | None = None
    """Logits become softcap · tanh(logits / softcap), as in Gemma 2."""

    def __post_init__(self) -> None:
        if self.divergence not in get_args(Divergence):
            raise ConfigError(
                f"divergence {self.divergence!r} is unknown: use one of {', '.join(get_args(Divergence))}"
            )
        if self.missing not in get_args(Missing):
            raise ConfigError(f"missing {self.missing!r} is unknown: use one of {', '.join(get_args(Missing))}")
        if self.missing == "uniform" and self.divergence not in ("ce", "kl"):
            raise ConfigError(
                f"missing 'uniform' is defined for ce and kl, not for {self.divergence}: use missing 'tail'"
            )
        if self.missing == "renormalise" and self.divergence == "reverse_kl":
            raise ConfigError(
                "reverse_kl is infinite where the teacher's tail is renormalised away: use missing 'tail'"
            )
        for name in ("temperature", "student_temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a finite number above 0")
        if self.divergence in ("jsd", "skew_kl") and not 0 < self.beta < 1:
            raise ConfigError(
                f"beta is {self.beta}: {self.divergence} needs 0 < beta < 1 (the ends are kl and reverse_kl)"
            )
        if self.divergence == "alpha" and not (self.beta > 0 and self.beta != 1):
            raise ConfigError(
                f"beta is {self.beta}: alpha needs beta > 0 and not 1 (the limits at 0 and 1 are reverse_kl and kl)"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}, expected 0 <= label_smoothing < 1")
        if not 0 <= self.z_loss < float("inf"):
            raise ConfigError(f"z_loss is {self.z_loss}, expected a finite number, 0 or more")
        if self.softcap is not None and not 0 < self.softcap < float("inf"):
            raise ConfigError(f"softcap is {self.softcap}, expected a finite number above 0, or None")

    def scalars(self) -> dict[str, Any]:
        """Return the fields as the backends take them: a softcap of 0 means none."""
        return {**asdict(self), "softcap": self.softcap or 0.0}
