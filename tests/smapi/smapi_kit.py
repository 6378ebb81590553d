"""Runs the plug-in as xapi does: a process with one argument, two environment variables and no standard input.

What a command does to its partners shows just as well when the plug-in's code runs in the test's own process, which takes
a tenth of the time; callers made with ``in_process=True`` do that. SIMSR_PLUGIN_PYTHON names another interpreter to run the
plug-in with (it must work from Python 3.6 on); then all run as processes.
"""

import functools
import os
import subprocess
import types
from pathlib import Path

import pytest

import smapi_wire

PLUGIN = Path(__file__).parents[2] / "simsr" / "smapi" / "SimSR"
ENVIRONMENT = {"PATH": "/sbin:/usr/sbin:/bin:/usr/bin", "ORIGINATOR": "SM"}
SR_UUID = "5b4d1f0e-3a52-4b8d-a4a3-2d1c6f7e4404"
HOST_REF = "OpaqueRef:1f6b0c55-0d4b-4f0e-9c59-0a86ab2c1101"
TASK_REF = "OpaqueRef:c3b0e5d1-11aa-4a0e-b1de-8b2f4c6d5505"


def load_plugin():
    """Return a fresh module with the plug-in's code."""
    module = types.ModuleType("simsr_plugin")
    module.__file__ = str(PLUGIN)
    exec(_plugin_code(), module.__dict__)
    return module


@functools.cache
def _plugin_code():
    return compile(PLUGIN.read_text(), str(PLUGIN), "exec")


def plugin_argv(plugin=PLUGIN):
    interpreter = os.environ.get("SIMSR_PLUGIN_PYTHON")
    return [interpreter, str(plugin)] if interpreter else [str(plugin)]


def start_plugin(document, argv=None, **options):
    """Start the plug-in with `document` (bytes) as its argument."""
    return subprocess.Popen((argv or plugin_argv()) + [document], env=ENVIRONMENT, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def read_plugin(process):
    """Return the answer of a plug-in process: it must end well and print that one document."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors == b""
    return smapi_wire.parse_answer(output)


def run_plugin(document, **options):
    return read_plugin(start_plugin(document, **options))


class Caller:
    """Sends commands for one SR. Members given to `call` replace those that xapi would send; None leaves one out."""

    def __init__(self, in_process=False, **device_config):
        self.in_process = in_process and not os.environ.get("SIMSR_PLUGIN_PYTHON")
        self.device_config = dict(device_config, SRmaster="true")
        self.members = {"host_ref": HOST_REF, "sr_uuid": SR_UUID, "subtask_of": TASK_REF}

    def document(self, command, args=(), vdi=None, **members):
        sent = dict(self.members, command=command, args=list(args), device_config=self.device_config)
        if vdi:
            sent.update(vdi_uuid=vdi, vdi_location=vdi, vdi_on_boot="persist", vdi_allow_caching="false")
        sent.update(members)
        return smapi_wire.request(command, {key: item for key, item in sent.items() if item is not None})

    def call(self, command, args=(), vdi=None, **members):
        document = self.document(command, args, vdi, **members)
        if self.in_process:
            return smapi_wire.parse_answer(load_plugin().answer(["SimSR", os.fsdecode(document)]))
        return run_plugin(document)

    def fault(self, command, args=(), vdi=None, **members):
        """Return the fault that the command must be answered with."""
        with pytest.raises(smapi_wire.Fault) as caught:
            self.call(command, args, vdi, **members)
        return caught.value
