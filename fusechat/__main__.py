"""Entry point of `fusechat` and `python -m fusechat`."""

from __future__ import annotations

import errno
import os
import select
import shlex
import sys

# Commands that keep what they have done, and find it when they are run again.
_RESUMED = (
    ["run"], ["demo"], ["extract"], ["align"], ["train"], ["merge"],
    ["eval", "answers"], ["eval", "judge"], ["eval", "alpaca"],
)  # fmt: skip


def _nobody_reads() -> bool:
    """Return whether the reader of this process's output has ended; else a pipe that breaks is another one, a fault."""
    output = select.poll()
    output.register(1, 0)  # POLLERR is told unasked
    return any(event & select.POLLERR for _, event in output.poll(0))


def main() -> None:
    """Run the command line; a user's error is one line on stderr and exit code 2, with `--debug` the traceback."""
    # A tokenizer used before a fork otherwise warns on every DataLoader worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from fusechat.errors import FusechatError, Stopped

    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        if sys.argv[1:2] == ["merge"]:
            from fusechat.commands.merge import merge

            merge(sys.argv[2:])  # without what the other commands need
            sys.stdout.flush()
        else:
            from fusechat.cli import app

            try:
                app()
            except SystemExit as end:
                if end.code == 130:  # typer's for an interruption, of which it says nothing
                    raise KeyboardInterrupt from None
                raise
    except FusechatError as error:
        if debug:
            raise
        print(f"fusechat: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            # `| head`, say: nothing is wrong, and nobody is told anything more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(1)
        # A folder that may not be written, a full disk: no fault of the code. What has no file to name may be one.
        if debug or (error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO)):
            raise
        place = "" if error.filename is None else f": {error.filename}"
        print(f"fusechat: {error.strerror}{place} (--debug shows where)", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            n = os.environ.get("WORLD_SIZE", "1")
            launcher = "" if n == "1" else f" (under its launcher, as now with {n} processes)"
            print(f"fusechat: {stop}; to go on{launcher}: {shlex.join(['fusechat', *sys.argv[1:]])}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        goes_on = sys.argv[1:2] in _RESUMED or sys.argv[1:3] in _RESUMED
        hint = "; the same command goes on where it stopped" if goes_on else ""
        print(f"fusechat: interrupted{hint}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
