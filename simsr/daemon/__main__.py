"""Start of ``simsrd``: Ctrl-C while everything is being imported, which takes a second, ends it without a traceback.

Nothing has been opened by then. From when it serves on, ``simsr.daemon.main`` stops it in order.
"""

from __future__ import annotations

import signal

__all__ = ["main"]


def main() -> None:
    """Entry of ``simsrd``."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from simsr.daemon.main import main as serve

    serve()


if __name__ == "__main__":
    main()
