"""Sockets of single VDIs come and go with API requests; two requests in one turn of the loop must not end the daemon."""

import gc
import os
import uuid

import pytest
import trio
import trio.testing
from daemon_tools import short_directory

from nbd_export.server import listen_unix
from simsr.daemon.host import Host


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked(0.01)


async def come_and_go(folder: str, host: Host) -> None:
    mounted = await host.create_sr("sr", None, "", {})
    repository = mounted.repository
    disk = repository.create(1 << 20, uuid=str(uuid.UUID(int=1)))
    host.added(disk)
    await host.delete_vdi(mounted, disk)  # by another client, who knew the uuid beforehand
    snapshot = repository.snapshot(repository.create(1 << 20))
    for _ in range(2):
        host.attach_host(mounted, snapshot, "host", writable=False, exclusive=True)
        host.detach_host(mounted, snapshot, "host")
    await settled()
    assert os.listdir(f"{folder}/nbd") == []
    host.attach_host(mounted, snapshot, "host", writable=False, exclusive=True)
    await settled()
    assert os.listdir(f"{folder}/nbd") == [f"{snapshot.uuid}.sock"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the sockets that are left over when it fails
async def test_a_socket_that_goes_before_it_was_served():
    failure = ""
    with short_directory() as folder:
        host = Host(folder)
        host.prepare()
        try:
            async with trio.open_nursery() as nursery:
                with listen_unix(host.nbd_socket) as listener:
                    await nursery.start(host.run, [listener])
                    await come_and_go(folder, host)
                    nursery.cancel_scope.cancel()
                    await trio.sleep_forever()
        except BaseExceptionGroup as group:
            failure = repr(group)
    gc.collect()
    assert not failure
