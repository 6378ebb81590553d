"""A scenario in force on disks in memory, as faces of the daemon would meet it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from types import SimpleNamespace

import trio

from scenarios.loader import load
from simsr.daemon.alarm import Alarm
from simsr.daemon.scenario_run import GROUP_KEY, ScenarioRun
from simsr.daemon.trace_files import TraceFiles

__all__ = ["RamDisk", "Stage", "stage", "timed", "SIZE"]

SIZE = 1 << 20


class RamDisk:
    """A disk of the daemon, in memory. ``durable`` is what a flush has made so."""

    def __init__(self, content: bytearray) -> None:
        self.content, self.scripted, self.tap, self.client_kind = content, None, None, "qemu"
        self.each_write_durable = False
        self.flushes = 0
        self.opened = trio.Event()  # its gate
        self.opened.set()

    async def passed(self):
        await self.opened.wait()

    def read(self, batch):
        for offset, view in batch:
            view[:] = self.content[offset : offset + len(view)]
        return []

    async def read_cold(self, batch):
        return [None for _ in self.read(batch)]

    def write(self, batch):
        for offset, length, view in batch:
            self.content[offset : offset + length] = bytes(length) if view is None else view
        return len(batch)

    def is_durable(self):
        return False

    def flush_soon(self, done):
        self.flushes += 1
        done(None)

    async def allocation_cold(self, offset, length, extents_max):
        return [(length, True)]

    def detach(self):
        pass


class Stage:
    def __init__(self, play, disks, vdis):
        self.play, self.disks, self.vdis = play, disks, vdis

    def __getitem__(self, name):
        return self.disks[name].scripted


@asynccontextmanager
async def stage(text, names=("one",), directory=None, seed=None, size_bytes=SIZE, groups="", alarm=None):
    """``async with stage(TOML) as here:`` the scenario is in force; ``here["one"]`` is what a face would call, ``here.disks["one"]`` below it.
    A text without a head gets one."""
    if "simsr = 1" not in text:
        text = 'simsr = 1\nname = "test"\n' + text
    vdis = {
        name: SimpleNamespace(
            uuid=f"uuid-{name}", sr="sr", name=name, size_bytes=size_bytes,
            meta={"sm_config": {GROUP_KEY: groups}}, volume=SimpleNamespace(ident=number, meta={"sm_config": {GROUP_KEY: groups}}),
        )
        for number, name in enumerate(names, 1)
    }
    disks = {name: RamDisk(bytearray(size_bytes)) for name in names}
    files = TraceFiles(directory)
    scenario = load(text, "test.toml", files.times)
    files.prepare(scenario)
    play = ScenarioRun(scenario, seed, files, alarm or Alarm(), lambda vdi: disks[vdi.name])
    for name, disk in disks.items():
        play.attach(vdis[name], disk)
    async with trio.open_nursery() as nursery:
        await nursery.start(play.run)
        yield Stage(play, disks, vdis)
        play.end()
        assert all(disk.scripted is None for disk in disks.values())


async def timed(call):
    began = trio.current_time()
    with trio.fail_after(10_000):
        result = await call
    return result, trio.current_time() - began
