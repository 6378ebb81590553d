"""Start of ``simsrd``: Ctrl-C while everything is being imported, which takes a second, ends it without a traceback.

Nothing has been opened by then. From when it serves on, ``simsr.daemon.main`` stops it in order.
"""

from __future__ import annotations

import signal

__all__ = ["let_interrupts_end_us", "main"]


def let_interrupts_end_us() -> None:
    """From now on SIGINT ends the process at once, where it would have raised KeyboardInterrupt; who ignores it goes on ignoring it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """Entry of ``simsrd``."""
    let_interrupts_end_us()
    from simsr.daemon.main import main as serve

    serve()


if __name__ == "__main__":
    main()
