"""Fixtures: an NbdServer in this process over disks of memory, and a real daemon that the tests of a file share."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon_tools import Simsrd, running_simsrd, short_directory
from fake_disks import Client, FakeDisk, FakeDisks

from nbd_export.server import NbdServer, listen_unix


class Rig:
    """A server on a unix socket, and the clients that a test makes."""

    def __init__(self, nursery, path: str) -> None:
        self.disks = FakeDisks()
        self.disk = self.disks.add("disk", FakeDisk())
        self.server = NbdServer(self.disks)
        self.path = path
        self.clients: list[Client] = []
        self.listener = listen_unix(path)
        nursery.start_soon(self.server.serve, self.listener)

    async def connect(self, name: str = "disk", **options: object) -> Client:
        client = await Client.connect(self.path, name, **options)
        self.clients.append(client)
        return client

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.listener.close()


@pytest.fixture
async def rig(nursery, caplog):
    """A server with the disk "disk". It must not meet anything that it calls a bug."""
    with short_directory() as folder:
        rig = Rig(nursery, f"{folder}/nbd.sock")
        yield rig
        rig.close()
    bugs = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert not bugs, bugs


@pytest.fixture
def folder() -> Iterator[str]:
    """A temporary directory with a short path."""
    with short_directory() as path:
        yield path


@pytest.fixture(scope="module")
def shared() -> Iterator[Simsrd]:
    """A daemon with one SR for all tests of a file; it has to end well."""
    with running_simsrd() as simsrd:
        simsrd.create_sr()
        yield simsrd


@pytest.fixture
def make_vdi(shared: Simsrd) -> Iterator[Callable[..., dict]]:
    """``make_vdi(size_bytes)``: a disk in the shared daemon, which goes with its snapshots when the test ends."""
    made: list[str] = []

    def make(size_bytes: int = 8 << 20, name: str = "", **more: object) -> dict:
        vdi = shared.create_vdi(size_bytes, name, **more)
        made.append(vdi["uuid"])
        return vdi

    yield make
    shared.wait_for_connections(0)
    for vdi in shared.get("/v1/vdis"):
        if vdi["uuid"] in made or vdi["snapshot_of"] in made:
            shared.delete(f"/v1/vdis/{vdi['uuid']}")


@pytest.fixture
def disk(make_vdi: Callable[..., dict]) -> dict:
    """A disk of 32 MiB in the shared daemon."""
    return make_vdi(32 << 20, "interop disk")


@pytest.fixture
def image(folder) -> Path:
    """A file of 32 MiB with data, zeros and holes."""
    path = Path(folder, "image")
    rng = random.Random(32)
    with open(path, "wb") as file:
        for at in range(0, 32 << 20, 1 << 20):
            if (at >> 20) % 3 == 0:
                file.seek(at)
                file.write(rng.randbytes(700 << 10))
        file.truncate(32 << 20)
    return path
