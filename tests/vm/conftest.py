"""Fixtures of the tests that boot virtual machines. They run only where script/vm-test has prepared them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_tools import Simsrd, running_simsrd
from vm_kit import Boot

from simsr.cli.client import Client

PREPARED = os.environ.get("SIMSR_VM_DIR")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.skipif(PREPARED is None, reason="script/vm-test runs it"))


@pytest.fixture(scope="session")
def boot(tmp_path_factory) -> Boot:
    """Kernel and initramfs of the guests."""
    return Boot(Path(PREPARED).resolve() / "kernel", tmp_path_factory.mktemp("boot"))


@pytest.fixture(scope="module")
def daemon() -> Iterator[Simsrd]:
    """A simsrd."""
    with running_simsrd() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def api(daemon) -> Iterator[Client]:
    """Its control API."""
    client = Client(daemon.socket)
    client.post("/v1/srs", {"name": "vm"})
    yield client
    client.close()


@pytest.fixture
def mount(api, tmp_path) -> Iterator[Path]:
    """Where the SR's VDIs are files (FUSE)."""
    path = tmp_path / "mount"
    path.mkdir()
    api.post("/v1/mounts", {"path": str(path), "cache": "direct", "shared": False})
    yield path / "vm"
    api.post("/v1/mounts/unmount", {"path": str(path), "lazy": False})
