"""What can go wrong through no fault of the code: one clear line each, exit code 2 on the command line."""

from __future__ import annotations

from collections.abc import Iterable


class FusechatError(Exception):
    """Base of all errors a user can mend; the message says what, where, and the mend, in one line."""


class ConfigError(FusechatError, ValueError):
    """A configuration or an argument is wrong."""


class DataError(FusechatError, ValueError):
    """A dialogue, a tokenizer or a model does not fit the work at hand."""


class FormatError(FusechatError, ValueError):
    """A file is corrupt, truncated or foreign."""


class MismatchError(FusechatError):
    """Two artefacts, or an artefact and a request, disagree about what they were made from."""


class NativeMissingError(FusechatError, ImportError):
    """The compiled engine was asked for and is not there."""


class Stopped(Exception):  # noqa: N818
    """A run was asked to stop and did so after saving: no error, and the same command goes on where it stopped."""

    exit_code = 0


class Interrupted(Stopped):
    """The same by Ctrl-C: what a shell would do next is not meant to follow."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """Return the first line of what another library's error says; the error's kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the end of an error line about a name that is not known: the known one it resembles, or all of them."""
    import difflib  # a millisecond, where something is wrong anyway

    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    return f", did you mean `{near[0]}`?" if near else f": there are {', '.join(names)}"
