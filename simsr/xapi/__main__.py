"""Start of ``simsr xapi serve``: as that of ``simsrd``, it is ended by Ctrl-C without a traceback as long as nothing is served."""

from __future__ import annotations

from simsr.daemon.__main__ import let_interrupts_end_us

__all__ = ["main"]


def main() -> None:
    """Entry of the server."""
    let_interrupts_end_us()
    from simsr.xapi.main import main as serve

    serve()


if __name__ == "__main__":
    main()
