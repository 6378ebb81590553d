"""Fixtures: the partners of the plug-in (simsrd, xapi), fake, and callers that send it commands."""

import tempfile
import uuid
from pathlib import Path

import pytest

from daemon_tools import running_simsrd
from simsrd_kit import make_pki
from smapi_fake_daemon import FakeDaemon
from smapi_fake_xapi import FakeXapi
from smapi_fakes import serving
from smapi_kit import SR_UUID, Caller, load_plugin
from smapi_wire import NIL


SR_BYTES = str(2 << 30)
"""Of SRs in a real daemon: without a limit each has 224 MiB written in advance."""


@pytest.fixture
def folder():
    """A folder with a path short enough for unix sockets, which pytest's own is not always."""
    with tempfile.TemporaryDirectory(prefix="simsr-") as path:
        yield Path(path)


@pytest.fixture
def daemon(folder):
    """A fake simsrd that holds one empty SR."""
    model = FakeDaemon()
    model.add_sr(SR_UUID)
    with serving(model, folder / "control.sock"):
        yield model


@pytest.fixture
def alone(daemon, folder):
    """A caller without xapi."""
    return Caller(in_process=True, socket=str(folder / "control.sock"), standalone="true")


@pytest.fixture
def xapi(folder):
    """A fake xapi whose database has the SR and no VDI."""
    model = FakeXapi()
    model.sr_ref = model.add("SR", uuid=SR_UUID, name_label="my SR", name_description="of tests",
                             virtual_allocation="0", physical_size="0", physical_utilisation="0", other_config={})
    with serving(model, folder / "xapi"):
        yield model


@pytest.fixture
def pool(daemon, xapi, folder):
    """A caller that acts as xapi does, with a session."""
    caller = Caller(in_process=True, socket=str(folder / "control.sock"), xapi_socket=str(folder / "xapi"))
    caller.members.update(session_ref=xapi.session_ref, sr_ref=xapi.sr_ref)
    return caller


@pytest.fixture
def script():
    """The plug-in's code as a module, for the parts that no request reaches."""
    return load_plugin()


# The real daemon.

@pytest.fixture(scope="package")
def shared():
    """A real simsrd that tests share, on its socket and over HTTPS. It holds one SR, SR_UUID."""
    with tempfile.TemporaryDirectory(prefix="simsr-") as path:
        pki = make_pki(Path(path))
        options = ["--https-cert", pki.certificate, "--https-key", pki.key, "--token-file", pki.token_file]
        with running_simsrd("--nbd-tcp", "127.0.0.1:0", "--https", "127.0.0.1:0", *options) as simsrd:
            simsrd.pki = pki
            assert Caller(in_process=True, socket=simsrd.socket, standalone="true").call("sr_create", [SR_BYTES]) is NIL
            yield simsrd


@pytest.fixture
def shared_socket(shared):
    return shared.socket


@pytest.fixture
def real(shared_socket):
    """A caller without xapi, on a host of its own, for the SR that tests share in a real simsrd."""
    caller = Caller(in_process=True, socket=shared_socket, standalone="true")
    caller.members["host_ref"] = f"OpaqueRef:{uuid.uuid4()}"
    return caller


@pytest.fixture
def real_pool(request, shared_socket, xapi, folder):
    """A caller with a session in the fake xapi, and with an SR of its own in a real simsrd; its size may be chosen (indirect)."""
    caller = Caller(in_process=True, socket=shared_socket, xapi_socket=str(folder / "xapi"))
    caller.members.update(session_ref=xapi.session_ref, sr_ref=xapi.sr_ref, sr_uuid=str(uuid.uuid4()))
    xapi.tables["SR"][xapi.sr_ref]["uuid"] = caller.members["sr_uuid"]
    assert caller.call("sr_create", [getattr(request, "param", SR_BYTES)]) is NIL
    return caller
