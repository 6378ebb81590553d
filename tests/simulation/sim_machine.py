"""The simulated machine: worker threads that take turns with trio's, files in memory, pipes in place of sockets, one clock.

Everything random comes from one generator and everything that happens goes through one thread at a time, so the same seed gives the
same run, byte for byte.

**Threads.** Blocking work of the daemon runs in a real thread, but only while trio's thread waits for it. Before every change that it makes to
a file it gives the turn back and goes on some simulated time later, so other tasks run in the middle of a flush or a checkpoint, and the power
fails there.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

import outcome
import trio

from nbd_export.channel import Channel
from simsr.store.memory import MemoryDirectory

__all__ = ["Failure", "Journal", "MemoryRoot", "Pipe", "Socket", "SimChannel", "Turns"]

PIPE_BYTES = 48 << 10
UNASKED_MAX = 3000
"""Changes of files after the last request."""


class Failure(AssertionError):
    """The simulation has found something wrong."""


class Journal:
    """What happened, line by line, with the simulated time."""

    def __init__(self, clock: trio.abc.Clock) -> None:
        self._clock = clock
        self.lines: list[str] = []
        self._ticks = 0

    def note(self, text: str) -> None:
        self.lines.append(f"{self._clock.current_time():.6f} {text}")

    def now_ns(self) -> int:
        """A clock for code that measures its own work: the simulated time, and a little more with each look at it."""
        self._ticks += 1
        return int(self._clock.current_time() * 1e9) + self._ticks * 700

    def bytes(self) -> bytes:
        return "\n".join(self.lines).encode()


# Threads.


class _Worker:
    """A thread that runs only between `turn` and the pause or the end that follows."""

    def __init__(self) -> None:
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._call: Callable[[], object] | None = None
        self.result: outcome.Outcome | None = None
        self.thread = threading.Thread(target=self._run, daemon=True, name="simulated worker")
        self.thread.start()

    def begin(self, call: Callable[[], object]) -> None:
        self._call, self.result = call, None

    def turn(self) -> bool:
        """Let it go on; whether its work is done."""
        self._go.release()
        self._back.acquire()
        return self.result is not None

    def pause(self) -> None:
        """Called in the thread: let the others go on until the next turn."""
        self._back.release()
        self._go.acquire()

    def end(self) -> None:
        self._call = None
        self._go.release()
        self.thread.join()

    def _run(self) -> None:
        while True:
            self._go.acquire()
            if self._call is None:
                return
            result = outcome.capture(self._call)
            self._call, self.result = None, result
            del result
            self._back.release()


class Turns:
    """`simsr.daemon.threads.Threads`. ``slowness`` scales how long each step of blocking work takes."""

    def __init__(self, rng: random.Random, note: Callable[[str], None]) -> None:
        self._rng, self._note = rng, note
        self._idle: list[_Worker] = []
        self._current: _Worker | None = None
        self.slowness = 1.0
        self.jobs = self.steps = 0
        self._unasked = 0

    def _delay_s(self) -> float:
        draw = self._rng.random()
        if draw < 0.45:
            return 0.0
        if draw < 0.95:
            return self._rng.random() * 0.002 * self.slowness
        if draw < 0.998:
            return self._rng.random() * 0.2 * self.slowness
        return self._rng.random() * 8

    def step(self, what: str) -> None:
        """For `MemoryDirectory.on_step`: a thread of ours is about to change a file."""
        worker = self._current
        if worker is not None and threading.current_thread() is worker.thread:
            self.steps += 1
            self._unasked += 1
            if self._unasked > UNASKED_MAX:
                raise Failure(f"{UNASKED_MAX} changes of files, and nobody has asked for anything: the daemon does not come to rest")
            self._note(f"disk: {what}")
            worker.pause()

    def asked(self) -> None:
        """Somebody wants something of the daemon."""
        self._unasked = 0

    async def run(self, call: Callable[[], object], limiter: trio.CapacityLimiter | None) -> object:
        await trio.lowlevel.checkpoint_if_cancelled()
        if limiter is None:
            return (await self._work(call)).unwrap()
        async with limiter:
            return (await self._work(call)).unwrap()

    def start(self, call: Callable[[], object], deliver: Callable[[outcome.Outcome], object]) -> None:
        async def task() -> None:
            deliver(await self._work(call))

        trio.lowlevel.spawn_system_task(task)

    async def _work(self, call: Callable[[], object]) -> outcome.Outcome:
        self.jobs += 1
        worker = self._idle.pop() if self._idle else _Worker()
        worker.begin(call)
        with trio.CancelScope(shield=True):
            done = False
            while not done:
                await trio.sleep(self._delay_s())
                before, self._current = self._current, worker
                done = worker.turn()
                self._current = before
            result, worker.result = worker.result, None
            self._idle.append(worker)
            await trio.sleep(self._delay_s())
        return result

    def close(self) -> None:
        for worker in self._idle:
            worker.end()


# Files.


class MemoryRoot:
    """`simsr.daemon.root.Root` without files or sockets: each SR a `MemoryDirectory`."""

    report_file = None

    def __init__(self, on_step: Callable[[str], None]) -> None:
        self._on_step = on_step
        self.directories: dict[str, MemoryDirectory] = {}
        self._new: dict[str, MemoryDirectory] = {}

    def prepare(self) -> None:
        self._new = {}

    def release(self) -> None:
        pass

    def srs(self) -> list[str]:
        return sorted(self.directories)

    def sr_path(self, name: str) -> str:
        return f"/simulated/sr/{name}"

    def open(self, name: str) -> MemoryDirectory:
        return self.directories[name]

    def begin(self, uuid: str) -> MemoryDirectory:
        directory = self._new[uuid] = MemoryDirectory(self._on_step)
        return directory

    def finish(self, directory: MemoryDirectory, uuid: str) -> None:
        self.directories[uuid] = self._new.pop(uuid)

    def give_up(self, uuid: str) -> None:
        self._new.pop(uuid, None)

    def remove(self, directory: MemoryDirectory, uuid: str) -> None:
        del self.directories[uuid]

    def listen(self, path: str) -> None:
        return None

    def unlisten(self, path: str) -> None:
        pass

    def survivor(self, survive: Callable[[MemoryDirectory], MemoryDirectory]) -> MemoryRoot:
        """What the next daemon finds."""
        root = MemoryRoot(self._on_step)
        for uuid, directory in self.directories.items():
            left = root.directories[uuid] = survive(directory)
            left.on_step, left.cold, left.room_bytes = self._on_step, directory.cold, directory.room_bytes
        return root


# Sockets.


class Pipe:
    """Bytes in one direction, with a limit. Who waits waits for `changed`."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ended = False
        self._changed = trio.Event()

    def changed(self) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        await trio.lowlevel.checkpoint()
        while not condition():
            await self._changed.wait()

    def end(self) -> None:
        self.ended = True
        self.changed()


class Socket:
    """One end of a pair, as far as `Channel` uses a socket. What arrives, and what is taken, comes in pieces of random length."""

    def __init__(self, incoming: Pipe, outgoing: Pipe, rng: random.Random) -> None:
        self.incoming, self.outgoing, self._rng = incoming, outgoing, rng

    @classmethod
    def pair(cls, rng: random.Random) -> tuple[Socket, Socket]:
        there, back = Pipe(), Pipe()
        return cls(there, back, rng), cls(back, there, rng)

    def _piece(self, most: int) -> int:
        return most if self._rng.random() < 0.7 else self._rng.randint(1, most)

    def recv_into(self, view: memoryview) -> int:
        data = self.incoming.data
        if not data:
            if self.incoming.ended:
                return 0
            raise BlockingIOError
        count = self._piece(min(len(data), len(view)))
        view[:count] = data[:count]
        del data[:count]
        self.incoming.changed()
        return count

    def send(self, data: bytes | memoryview) -> int:
        pipe = self.outgoing
        if pipe.ended:
            raise BrokenPipeError("the other side has closed")
        room = min(PIPE_BYTES - len(pipe.data), len(data))
        if not room:
            raise BlockingIOError
        count = self._piece(room)
        pipe.data += memoryview(data)[:count]
        pipe.changed()
        return count

    def sendmsg(self, parts: Sequence[bytes | memoryview]) -> int:
        return self.send(b"".join(parts))

    async def readable(self) -> None:
        pipe = self.incoming
        await pipe.until(lambda: bool(pipe.data) or pipe.ended)

    async def writable(self) -> None:
        pipe = self.outgoing
        await pipe.until(lambda: len(pipe.data) < PIPE_BYTES or pipe.ended)

    def close(self) -> None:
        self.incoming.end()
        self.outgoing.end()


class SimChannel(Channel):
    """The server's end of a pair."""

    def __init__(self, sock: Socket, now_ns: Callable[[], int]) -> None:
        super().__init__(sock)
        self.readable, self.writable, self.now_ns = sock.readable, sock.writable, now_ns
