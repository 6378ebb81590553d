"""Fixtures: the partners of the plug-in (simsrd, xapi), fake, and callers that send it commands."""

import tempfile
import types
from pathlib import Path

import pytest

from smapi_fake_daemon import FakeDaemon
from smapi_fake_xapi import FakeXapi
from smapi_fakes import serving
from smapi_kit import PLUGIN, SR_UUID, Caller


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
    return Caller(socket=str(folder / "control.sock"), standalone="true")


@pytest.fixture
def xapi(folder):
    """A fake xapi whose database has the SR and no VDI."""
    model = FakeXapi()
    model.sr_ref = model.add("SR", uuid=SR_UUID, name_label="my SR", name_description="of tests",
                             virtual_allocation="0", physical_size="0", physical_utilisation="0")
    with serving(model, folder / "xapi"):
        yield model


@pytest.fixture
def pool(daemon, xapi, folder):
    """A caller that acts as xapi does, with a session."""
    caller = Caller(socket=str(folder / "control.sock"), xapi_socket=str(folder / "xapi"))
    caller.members.update(session_ref=xapi.session_ref, sr_ref=xapi.sr_ref)
    return caller


@pytest.fixture
def script():
    """The plug-in's code as a module, for the parts that no request reaches."""
    module = types.ModuleType("simsr_plugin")
    module.__file__ = str(PLUGIN)
    exec(compile(PLUGIN.read_text(), str(PLUGIN), "exec"), module.__dict__)
    return module
