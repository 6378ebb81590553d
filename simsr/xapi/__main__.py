"""Start of ``simsr xapi serve``: as that of ``simsrd``, it is ended by Ctrl-C without a traceback as long as nothing is served."""

from __future__ import annotations

import signal

__all__ = ["main"]


def main() -> None:
    """Entry of the server."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from simsr.xapi.main import main as serve

    serve()


if __name__ == "__main__":
    main()
