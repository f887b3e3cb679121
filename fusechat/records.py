"""What flows between the stages before it becomes a store: dialogues and their encodings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

RoleName = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message of a dialogue."""

    role: RoleName
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialogue:
    """A list of messages; `plain` marks running text, held as one assistant message and rendered without a template.

    `goes_on` marks a piece of running text behind which its document goes on.
    """

    messages: tuple[Message, ...]
    category: str = ""
    plain: bool = False
    goes_on: bool = False

    @property
    def answer_bytes(self) -> int:
        """The UTF-8 bytes of what the assistant says."""
        return sum(len(message.content.encode()) for message in self.messages if message.role == "assistant")


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A dialogue in one model's tokens.

    `input_ids` int32[T]; `loss_mask` bool[T], true where the token is the assistant's (its content and the token that
    ends the turn); `turn` int32[T], the index of the assistant message a masked token belongs to, −1 elsewhere;
    `byte_end` int32[T], where a masked token ends in the UTF-8 bytes of that message's content, tokens after the
    content where its last token ends, −1 elsewhere. Equal `turn` and `byte_end` in two models' encodings mean the same
    text so far.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    turn: npt.NDArray[np.int32]
    byte_end: npt.NDArray[np.int32]
