"""simsrd as it is, but every checkpoint's begin and end are noted in the file that ``SIMSR_BENCH_CHECKPOINTS`` names.

Asking the daemon all the time whether a checkpoint is under way would itself be what makes writes wait.
"""

from __future__ import annotations

import os
import time

from simsr.daemon.main import main
from simsr.daemon.upkeep import Upkeep


def note_checkpoints(path: str) -> None:
    """Append a line "begin end" (seconds since the epoch) to ``path`` for every checkpoint from now on."""
    checkpoint = Upkeep._checkpoint

    async def noted(self: Upkeep) -> None:
        began = time.time()
        try:
            await checkpoint(self)
        finally:
            with open(path, "a") as file:
                file.write(f"{began} {time.time()}\n")

    Upkeep._checkpoint = noted


if __name__ == "__main__":
    note_checkpoints(os.environ["SIMSR_BENCH_CHECKPOINTS"])
    main()
