"""device_config:attach = nbd-client and tapdisk, with a real simsrd and stand-ins for the host's programs."""

import json
import os
import signal
import time

import pytest

from smapi_host import Host, is_running
from smapi_kit import load_plugin, run_plugin, start_plugin
from smapi_wire import NIL, check_attach, check_vdi_info

MIB = 2**20
TAP_STEPS = ["allocate", "spawn", "attach", "open"]


@pytest.fixture
def host(folder):
    made = Host(folder / "host")
    yield made
    made.close()


@pytest.fixture(params=["nbd-client", "tapdisk"])
def style(request):
    return request.param


@pytest.fixture
def dom0(real, host):
    """A caller that attaches with nbd-client."""
    real.device_config.update(host.device_config, attach="nbd-client")
    return real


@pytest.fixture
def guests(real, host):
    """A caller that attaches with tapdisk."""
    real.device_config.update(host.device_config, attach="tapdisk")
    return real


@pytest.fixture
def any_style(real, host, style):
    real.device_config.update(host.device_config, attach=style)
    return real


def create(caller):
    return check_vdi_info(caller.call("vdi_create", [str(MIB)]))


def ask(caller, vdi):
    """What simsrd says about the VDI."""
    daemon = load_plugin().Daemon(load_plugin().Config(caller.device_config))
    return daemon.call("GET", f"/v1/vdis/{vdi}")


def kinds(caller, vdi):
    return sorted(entry["kind"] for entry in ask(caller, vdi)["attached"])


def wait_for(condition):
    give_up = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.01)


def start(caller, vdi, writable="true"):
    answer = caller.call("vdi_attach", [writable], vdi=vdi)
    assert caller.call("vdi_activate", [writable], vdi=vdi) is NIL
    return answer


def stop(caller, vdi):
    assert caller.call("vdi_deactivate", vdi=vdi) is NIL
    assert caller.call("vdi_detach", vdi=vdi) is NIL


# --- nbd-client ---

def test_nbd_client_from_attach_to_detach(dom0, host):
    disk = create(dom0)
    answer = start(dom0, disk)
    path, _ = check_attach(answer)
    assert answer["params"] == "/dev/nbd0" and path.endswith(f"/nbd/{disk}.sock")
    connect = ["nbd-client", "-unix", path, "/dev/nbd0", "-timeout", "90", "-persist", "-name", disk]
    assert host.calls() == [connect]
    wait_for(lambda: kinds(dom0, disk) == ["attach", "nbd"])
    assert host.notes() == ["nonpersistent/nbd/0", f"simsr/attached/{disk}"]
    assert json.loads((host.folder / "run/nonpersistent/nbd/0").read_text()) == {"path": path, "exportname": disk}
    assert start(dom0, disk) == answer
    assert host.calls() == [connect]
    stop(dom0, disk)
    stop(dom0, disk)
    assert host.calls() == [connect, ["nbd-client", "-d", "/dev/nbd0"]]
    wait_for(lambda: kinds(dom0, disk) == [])
    host.check_clean()


def test_nbd_module_is_loaded_unless_it_is_there(dom0, host):
    dom0.call("vdi_attach", ["true"], vdi=create(dom0))
    loaded = '"modprobe", "nbd", "nbds_max=24"' in (host.folder / "state/calls").read_text()
    assert loaded or os.path.isdir("/sys/module/nbd")


def test_each_disk_gets_a_device_of_its_own(dom0, host):
    disks = [create(dom0) for _ in range(2)]
    assert [start(dom0, disk)["params"] for disk in disks] == ["/dev/nbd0", "/dev/nbd1"]
    stop(dom0, disks[0])
    assert start(dom0, disks[0])["params"] == "/dev/nbd0"
    for disk in disks:
        stop(dom0, disk)
    host.check_clean()


def test_device_that_somebody_else_takes_meanwhile(dom0, host):
    disk = create(dom0)
    host.plan(connect="taken")
    (host.folder / "run/nonpersistent/nbd").mkdir(parents=True)
    assert start(dom0, disk)["params"] == "/dev/nbd1"
    stop(dom0, disk)
    assert host.devices() == ["nbd0"] and host.notes() == ["nonpersistent/nbd/0"]


def test_device_that_belongs_to_somebody_else_by_now_is_left_alone(dom0, host):
    """Somebody disconnected ours behind our back, and xapi has connected the device for itself."""
    disk = create(dom0)
    start(dom0, disk)
    (host.folder / "run/nonpersistent/nbd/0").write_text('{"path": "/x", "exportname": "another"}')
    host.forget_calls()
    stop(dom0, disk)
    assert host.calls() == [] and host.devices() == ["nbd0"]
    assert host.notes() == ["nonpersistent/nbd/0"]


def test_device_that_was_disconnected_behind_our_back_is_made_anew(dom0, host):
    disk = create(dom0)
    start(dom0, disk)
    os.kill(host.state("nbd0")["pid"], signal.SIGKILL)
    (host.folder / "state/nbd0").unlink()
    assert start(dom0, disk)["params"] == "/dev/nbd0"
    stop(dom0, disk)
    host.check_clean()


def test_all_devices_in_use(dom0, host):
    for number in range(24):
        (host.folder / f"state/nbd{number}").write_text('{"pid": 1}')
    disk = create(dom0)
    fault = dom0.fault("vdi_attach", ["true"], vdi=disk)
    assert fault.number == 46 and "24 nbd devices" in fault.text
    wait_for(lambda: kinds(dom0, disk) == [])
    assert host.notes() == []


def test_nbd_client_that_fails_leaves_nothing(dom0, host):
    disk = create(dom0)
    host.plan(connect="fail")
    fault = dom0.fault("vdi_attach", ["true"], vdi=disk)
    assert fault.number == 46 and "Connection refused" in fault.text and "-unix" in fault.text
    wait_for(lambda: kinds(dom0, disk) == [])
    host.check_clean()


def test_failure_of_a_repeated_attach_keeps_what_the_first_made(dom0, host):
    disk = create(dom0)
    start(dom0, disk)
    os.kill(host.state("nbd0")["pid"], signal.SIGKILL)
    (host.folder / "state/nbd0").unlink()
    host.plan(connect="fail")
    assert dom0.fault("vdi_attach", ["true"], vdi=disk).number == 46
    assert "attach" in kinds(dom0, disk)
    stop(dom0, disk)
    host.check_clean()


@pytest.mark.parametrize("hang", ["hang", "connect and hang"])
def test_nbd_client_that_hangs_is_ended_by_the_deadline(dom0, host, hang):
    disk = create(dom0)
    host.plan(connect=hang)
    dom0.device_config["deadline_s"] = "1.5"
    assert dom0.fault("vdi_attach", ["true"], vdi=disk).number == 47
    assert kinds(dom0, disk) in ([], ["nbd"])
    host.check_clean()


def test_device_that_cannot_be_released_is_a_fault_and_not_forgotten(dom0, host):
    disk = create(dom0)
    start(dom0, disk)
    host.plan(disconnect=True)
    fault = dom0.fault("vdi_detach", vdi=disk)
    assert fault.number == 46 and "disconnect failed" in fault.text
    assert "attach" in kinds(dom0, disk) and f"simsr/attached/{disk}" in host.notes()
    stop(dom0, disk)
    host.check_clean()


def test_plugin_killed_while_it_attaches(dom0, host):
    disk = create(dom0)
    host.plan(connect="connect and hang")
    process = start_plugin(dom0.document("vdi_attach", ["true"], vdi=disk))
    wait_for(lambda: host.state("hanging"))
    process.kill()
    process.communicate()
    os.kill(host.state("hanging"), signal.SIGKILL)  # what the dead one has left running
    stop(dom0, disk)
    assert host.devices() == [] and host.notes() == []
    wait_for(lambda: kinds(dom0, disk) == [])


# --- tapdisk ---

def test_tapdisk_from_attach_to_detach(guests, host):
    disk, sr = create(guests), guests.members["sr_uuid"]
    answer = guests.call("vdi_attach", ["true"], vdi=disk)
    link, _ = check_attach(answer)
    assert link == f"{host.folder}/run/blktap-control/nbd/{sr}/{disk}" and "params" not in answer
    assert answer["o_direct"] is True
    assert host.calls() == [] and not os.path.lexists(link)
    assert guests.call("vdi_activate", ["true"], vdi=disk) is NIL
    pid = list(host.state("taps")["pids"])[0]
    tap = ["-p", pid, "-m", "0"]
    image = "nbd:" + ask(guests, disk)["nbd_socket"]
    begun = [["tap-ctl", "allocate"], ["tap-ctl", "spawn"], ["tap-ctl", "attach", *tap], ["tap-ctl", "open", *tap, "-a", image]]
    assert host.calls() == begun
    assert os.readlink(link) == f"{host.folder}/run/blktap-control/nbd{pid}.0" and os.path.exists(link)
    wait_for(lambda: kinds(guests, disk) == ["attach", "nbd"])
    assert start(guests, disk) == answer
    assert host.calls() == begun
    stop(guests, disk)
    stop(guests, disk)
    assert host.calls() == [*begun, ["tap-ctl", "close", *tap], ["tap-ctl", "detach", *tap], ["tap-ctl", "free", "-m", "0"]]
    assert os.listdir(host.folder / "run/blktap-control/nbd") == []
    wait_for(lambda: kinds(guests, disk) == [])
    host.check_clean()


def test_tapdisk_for_reading(guests, host):
    snapshot = check_vdi_info(guests.call("vdi_snapshot", vdi=create(guests)))
    start(guests, snapshot, "false")
    assert host.calls("tap-ctl")[-1][-1] == "-R"
    stop(guests, snapshot)
    host.check_clean()


@pytest.mark.parametrize("step", TAP_STEPS)
def test_tapdisk_that_fails_leaves_nothing(guests, host, step):
    disk = create(guests)
    guests.call("vdi_attach", ["true"], vdi=disk)
    host.plan(**{step: True})
    fault = guests.fault("vdi_activate", ["true"], vdi=disk)
    assert fault.number == 453 and f"tap-ctl {step}" in fault.text and "planned failure" in fault.text
    host.check_clean()
    start(guests, disk)
    stop(guests, disk)
    host.check_clean()


@pytest.mark.parametrize("step", ["close", "detach"])
def test_tapdisk_that_cannot_be_stopped_is_a_fault_and_not_forgotten(guests, host, step):
    disk = create(guests)
    start(guests, disk)
    host.plan(**{step: True})
    assert guests.fault("vdi_deactivate", vdi=disk).number == 453
    assert f"simsr/attached/{disk}" in host.notes()
    stop(guests, disk)
    host.check_clean()


def test_tapdisk_that_has_died_is_started_anew(guests, host):
    disk = create(guests)
    start(guests, disk)
    pid = int(list(host.state("taps")["pids"])[0])
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_running(pid))
    start(guests, disk)
    assert len(host.state("taps")["pids"]) == 1
    stop(guests, disk)
    assert host.notes() == [f"blktap-control/nbd{pid}.0"]  # the dead one's own


def test_tapdisk_whose_note_is_lost_is_found(guests, host):
    """There may be only one tapdisk for a disk."""
    disk = create(guests)
    start(guests, disk)
    (host.folder / f"run/simsr/attached/{disk}").unlink()
    start(guests, disk)
    assert len(host.state("taps")["pids"]) == 1
    stop(guests, disk)
    host.check_clean()


def test_detach_alone_undoes_everything(guests, host):
    disk = create(guests)
    start(guests, disk)
    assert guests.call("vdi_detach", vdi=disk) is NIL
    host.check_clean()


# --- both ---

def test_disk_in_use_is_protected_and_free_again_after(any_style, host):
    disk = create(any_style)
    snapshot = check_vdi_info(any_style.call("vdi_snapshot", vdi=disk))
    start(any_style, disk)
    wait_for(lambda: kinds(any_style, disk) == ["attach", "nbd"])
    assert any_style.fault("vdi_revert", [disk], vdi=snapshot).number == 24
    assert any_style.fault("sr_detach").number == 16
    stop(any_style, disk)
    assert any_style.call("vdi_revert", [disk], vdi=snapshot) is NIL


def test_devices_are_undone_when_the_daemon_is_away(any_style, host, folder):
    disk = create(any_style)
    start(any_style, disk)
    socket, any_style.device_config["socket"] = any_style.device_config["socket"], str(folder / "nobody")
    assert any_style.fault("vdi_deactivate", vdi=disk).number == 47
    assert any_style.fault("vdi_detach", vdi=disk).number == 47
    host.check_clean()
    any_style.device_config["socket"] = socket
    stop(any_style, disk)


def test_sr_detach_undoes_what_has_no_connection_any_more(any_style, host):
    disk = create(any_style)
    start(any_style, disk)
    for process in host._pids():
        os.kill(process, signal.SIGKILL)
    wait_for(lambda: kinds(any_style, disk) == ["attach"])
    assert any_style.call("sr_detach") is NIL
    assert f"simsr/attached/{disk}" not in host.notes() and kinds(any_style, disk) == []


def test_sr_detach_undoes_what_is_left_of_an_sr_that_is_gone(any_style, host):
    disk = create(any_style)
    start(any_style, disk)
    note = host.folder / f"run/simsr/attached/{disk}"
    gone = "99999999-3a52-4b8d-a4a3-2d1c6f7e4404"
    note.write_text(json.dumps(dict(json.loads(note.read_text()), sr=gone)))
    assert any_style.call("sr_detach", sr_uuid=gone) is NIL
    assert not note.exists() and host.devices() == []
    assert any_style.call("vdi_detach", vdi=disk) is NIL


def test_missing_program_is_named(any_style, host, style):
    program = "nbd-client" if style == "nbd-client" else "tap-ctl"
    (host.folder / "bin" / program).unlink()
    disk = create(any_style)
    fault = any_style.fault("vdi_attach" if style == "nbd-client" else "vdi_activate", ["true"], vdi=disk)
    assert fault.number == 46 and f"there is no {program} in" in fault.text
    assert host.notes() == [] and kinds(any_style, disk) == []


def test_program_that_others_can_change_is_not_run(dom0, host):
    (host.folder / "bin/nbd-client").chmod(0o777)
    fault = dom0.fault("vdi_attach", ["true"], vdi=create(dom0))
    assert fault.number == 46 and "others than root" in fault.text
    assert host.calls(looks=True) == []


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_note_that_cannot_be_read(any_style, host, text):
    disk = create(any_style)
    (host.folder / "run/simsr/attached").mkdir(parents=True)
    (host.folder / f"run/simsr/attached/{disk}").write_text(text)
    fault = any_style.fault("vdi_detach", vdi=disk)
    assert fault.number == 46 and disk in fault.text and "note" in fault.text


def test_run_dir_that_cannot_be_written(any_style, host, style):
    (host.folder / "run/simsr").write_text("in the way")
    disk = create(any_style)
    fault = any_style.fault("vdi_attach" if style == "nbd-client" else "vdi_activate", ["true"], vdi=disk)
    assert fault.number == 46 and "devices of this host" in fault.text
    assert kinds(any_style, disk) == [] and host.calls() == []


@pytest.mark.parametrize("style", ["nbd", "nbd-client", "tapdisk"])
def test_boot_without_xapi(real, host, style):
    """static-vdis: the string of vdi_generate_config is run as it is, and again with the other command in it."""
    real.device_config.update(host.device_config, attach=style, a_secret="s3cret")
    disk = create(real)
    config = real.call("vdi_generate_config", vdi=disk)
    assert "s3cret" not in config and "session_ref" not in config and real.members["host_ref"] in config
    for _ in range(2):
        answer = run_plugin(config.encode())
        assert ("params" in answer) is (style == "nbd-client") and ("params_nbd" in answer) is (style != "nbd-client")
    assert "attach" in kinds(real, disk)
    assert (host.calls() == []) is (style == "nbd")
    detach = config.replace("vdi_attach_from_config", "vdi_detach_from_config")
    for _ in range(2):
        assert run_plugin(detach.encode()) is NIL
    host.check_clean()
    wait_for(lambda: kinds(real, disk) == [])


def test_no_secret_in_arguments_of_programs(any_style, host):
    any_style.device_config["password_secret"] = "s3cret"
    disk = create(any_style)
    start(any_style, disk)
    stop(any_style, disk)
    assert "s3cret" not in json.dumps(host.calls(looks=True))
