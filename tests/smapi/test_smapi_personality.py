"""A driver that is like another type of SR: what the description beside it does to the plug-in. No partner is needed for that."""

import json
import types
import xmlrpc.client
from pathlib import Path

import pytest

import smapi_wire
from simsr.personalities import SIM, find_personality
from smapi_kit import PLUGIN


@pytest.fixture
def driver(tmp_path):
    """The plug-in's code under the name of a driver of some type, as a module; SRs are asked for at a socket where nobody is."""

    def load(name):
        module = types.ModuleType("simsr_driver")
        module.__file__ = str(tmp_path / "TypeSR")
        if name:
            (tmp_path / "TypeSR.personality").write_text(json.dumps(find_personality(name).describe()))
        exec(compile(PLUGIN.read_text(), str(PLUGIN), "exec"), module.__dict__)
        return module

    return load


def ask(module, command, args=(), **members):
    config = dict(members.pop("device_config", {}), socket="/nonexistent/control.sock", standalone="true")
    members = dict({"sr_uuid": "5b4d1f0e-3a52-4b8d-a4a3-2d1c6f7e4404"}, command=command, args=list(args), device_config=config, **members)
    document = smapi_wire.request(command, members)
    try:
        return smapi_wire.parse_answer(module.answer(["TypeSR", document.decode()]))
    except smapi_wire.Fault as fault:
        return fault.number


def test_the_table_says_the_same_of_sim_as_the_plugin(driver):
    module = driver(None)
    assert set(SIM.capabilities) == set(module.CAPABILITIES)
    assert set(ask(module, "sr_get_driver_info")["capabilities"]) == set(SIM.capabilities)


@pytest.mark.parametrize("name", ["ext", "nfs+revert", "lvmoiscsi", "iso", "udev", "array"])
def test_capabilities_and_what_is_not_there(driver, name):
    module, like = driver(name), find_personality(name)
    info = ask(module, "sr_get_driver_info")
    assert info["capabilities"] == list(like.capabilities) and name in info["name"]
    vdi = {"vdi_uuid": "d15c0001-7b7e-4a53-9a7b-5d0a6e1f6606"}
    for command, capability in module.CAPABILITY_OF.items():
        members = {} if command == "sr_probe" else dict(vdi, new_uuid=vdi["vdi_uuid"], vdi_location=vdi["vdi_uuid"])
        args = {"vdi_create": ["1048576"], "vdi_resize": ["2097152"], "vdi_revert": ["d15c0001-7b7e-4a53-9a7b-5d0a6e1f6607"],
                "vdi_list_changed_blocks": ["d15c0001-7b7e-4a53-9a7b-5d0a6e1f6607"]}.get(command, [])
        # 47: it went on to ask simsrd.
        assert ask(module, command, args, **members) == (47 if capability in like.capabilities else 38), command
    begin = ask(module, "vdi_epoch_begin", vdi_on_boot="reset", **vdi)
    assert begin == (47 if "VDI_RESET_ON_BOOT/2" in like.capabilities else 38)
    assert ask(module, "vdi_epoch_begin", vdi_on_boot="persist", **vdi) == 47
    assert ask(module, "sr_content_type") == ("iso" if name == "iso" else "")


def test_revert_off_goes_before_the_type(driver):
    module = driver("nfs+revert")
    Path(module.__file__ + module.NO_REVERT_SUFFIX).touch()
    assert "VDI_REVERT" not in ask(module, "sr_get_driver_info")["capabilities"]


@pytest.mark.parametrize("name, style", [("ext", "tapdisk"), ("hba", "nbd-client"), ("iso", "nbd-client"), ("sim", "nbd")])
def test_attach_like_the_real_driver(driver, name, style):
    module = driver(name)
    assert module.Config({"attach": "like"}).attach == style
    assert module.Config({}).attach == "nbd" and module.Config({"attach": "tapdisk"}).attach == "tapdisk"


def test_config_that_does_not_fit(driver):
    module = driver("ext")
    for config in ({"personality": "nfs"}, {"personality": "ext+revert"}, {"personalty": "ext"}):
        assert ask(module, "sr_scan", device_config=config) == 91, config
    assert ask(module, "sr_scan", device_config={"personality": "ext"}) == 47


def test_attach_like_nothing(driver):
    assert ask(driver(None), "sr_scan", device_config={"attach": "like"}) == 91


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"name": 1, "capabilities": []}', '{"name": "ext", "capabilities": [1]}', "{}", "\xff"])
def test_description_that_is_damaged(driver, tmp_path, text):
    module = driver(None)
    (tmp_path / "TypeSR.personality").write_bytes(text.encode("latin-1"))
    document = smapi_wire.request("sr_get_driver_info", {"command": "sr_get_driver_info", "args": [], "device_config": {}})
    with pytest.raises(xmlrpc.client.Fault) as caught:
        xmlrpc.client.loads(module.answer(["TypeSR", document.decode()]))
    assert caught.value.faultCode == 91 and "TypeSR.personality" in caught.value.faultString
