"""Entry point of ``simsr``: runs a command and turns its outcome into messages and an exit status.

Exit status: 0 done, 1 failed, 2 wrong usage, 4 daemon not reachable, 10 and up one per class of error
(``simsr.errors``), 128 + n ended by signal n. Nothing is imported before the first ``try``, so that even a Ctrl-C
during start-up ends without a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]

INTERRUPTED = 130
BROKEN_PIPE = 1


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``simsr`` with ``arguments`` (those of the process if None) and exit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _run(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        status = BROKEN_PIPE
        _drop_output()
    except OSError as error:  # what was printed is written last, or goes to a full disk
        status = _report(error)
        _drop_output()
    sys.exit(status)


def _run(words: list[str]) -> int:
    import os
    import signal

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "w"))
    # A KeyboardInterrupt in the middle of an import can be lost there, or leave half a module: until all is there Ctrl-C just ends us.
    interrupted = signal.getsignal(signal.SIGINT)
    if interrupted is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from simsr.cli.app import app
    from simsr.cli.client import Session

    signal.signal(signal.SIGINT, interrupted)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP, and so do we then
            signal.signal(number, lambda received, frame: sys.exit(128 + received))
    session = Session()
    try:
        return int(app(words, prog_name="simsr", standalone_mode=False, obj=session) or 0)
    except BrokenPipeError:
        raise
    except Exception as error:
        if session.debug:
            import traceback

            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    """Print what went wrong and return the exit status for it."""
    import errno

    from simsr.cli.output import complain
    from simsr.errors import SimsrError

    if isinstance(error, SimsrError):
        complain(str(error), error.hint)
        return error.exit_code
    if hasattr(error, "format_message"):  # the parser's complaint about the command line
        from simsr.cli.usage import complain_about_usage

        return complain_about_usage(error)
    if isinstance(error, UnicodeEncodeError):  # an argument as the system gave it to us
        around = error.object[max(0, error.start - 20) : error.end + 20]
        complain(f"an argument is not UTF-8: {around!r}")
        return 2
    if isinstance(error, OSError) and error.filename is not None:
        complain(f"cannot use {error.filename}: {error.strerror}")
        return 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        complain(f"cannot write standard output: {error.strerror}", "Make room there, or send it elsewhere.")
        return 1
    if type(error).__name__ == "Abort":  # how older versions of the parser report Ctrl-C
        return INTERRUPTED
    complain(
        f"internal error: {type(error).__name__}: {error}", "Run it again as 'simsr --debug ...' and report what it says."
    )
    return 1


def _drop_output() -> None:
    """Point standard output at nothing, so that the interpreter's last flush cannot fail either."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
