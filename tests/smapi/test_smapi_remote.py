"""device_config:url: a simsrd on another machine, known by its certificate, which knows us by a token."""

import socket
import ssl
import threading
import types
import uuid
from contextlib import contextmanager

import pytest

from simsrd_kit import TOKEN
from smapi_host import Host
from smapi_kit import Caller, load_plugin, run_plugin
from smapi_wire import NIL, check_vdi_info

MIB = 2**20
REMOTE = "https://127.0.0.1:8443"
KEYS = {"url": REMOTE, "fingerprint": "00" * 32, "token_file": "/nowhere/token"}


@pytest.fixture(scope="module")
def url(shared):
    """Where the shared simsrd listens for HTTPS."""
    plugin = load_plugin()
    return plugin.Daemon(plugin.Config({"socket": shared.socket})).call("GET", "/v1/daemon")["https"]


@pytest.fixture
def remote(shared, url):
    """A caller in another host, as it were."""
    caller = Caller(in_process=True, url=url, fingerprint=shared.pki.fingerprint, token_file=shared.pki.token_file,
                    standalone="true")
    caller.members["host_ref"] = f"OpaqueRef:{uuid.uuid4()}"
    return caller


@pytest.fixture
def host(folder, remote):
    """The host's programs, which the caller uses."""
    made = Host(folder / "host")
    remote.device_config.update(made.device_config)
    yield made
    made.close()


def create(caller):
    return check_vdi_info(caller.call("vdi_create", [str(MIB)]))


# --- Who it is ---

@pytest.mark.parametrize("write", [str, str.upper, lambda text: ":".join(text[i:i + 2] for i in range(0, 64, 2))])
def test_known_by_its_fingerprint(remote, write):
    remote.device_config["fingerprint"] = write(remote.device_config["fingerprint"])
    assert remote.call("sr_update") is NIL


def test_known_by_its_authority(remote, shared):
    del remote.device_config["fingerprint"]
    remote.device_config["cacert"] = shared.pki.certificate
    assert remote.call("sr_update") is NIL
    remote.device_config["fingerprint"] = shared.pki.fingerprint
    assert remote.call("sr_update") is NIL
    remote.device_config["fingerprint"] = "0" * 64
    assert remote.fault("sr_update").number == 47


def test_certificate_must_be_for_the_host(remote, shared):
    del remote.device_config["fingerprint"]
    remote.device_config.update(cacert=shared.pki.certificate, url=remote.device_config["url"].replace("127.0.0.1", "localhost"))
    fault = remote.fault("sr_update")
    assert fault.number == 47 and "localhost" in fault.text


def test_as_a_process(remote):
    assert run_plugin(remote.document("sr_update")) is NIL


@contextmanager
def impostor(pki, tls=True):
    """A server with another's certificate; yields its URL and what was sent to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.certificate, pki.key)
    got = []

    def serve():
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(10)
            if not tls:
                return ended.wait(10)
            try:
                with context.wrap_socket(sock, server_side=True) as secure:
                    got.append(secure.recv(65536))
            except OSError:
                got.append(b"")

    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}", got
        ended.set()
        thread.join()


def test_nothing_is_sent_to_one_who_is_not_known(remote, shared):
    with impostor(shared.pki) as (url, got):
        remote.device_config.update(url=url, fingerprint="0" * 64)
        fault = remote.fault("sr_update")
    assert fault.number == 47 and shared.pki.fingerprint in fault.text and url in fault.text
    assert got == [b""]


def test_one_who_never_finishes_the_handshake(remote, shared):
    with impostor(shared.pki, tls=False) as (url, _):
        remote.device_config.update(url=url, deadline_s="0.3")
        assert remote.fault("sr_update").number == 47


def test_nobody_there(remote):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        remote.device_config["url"] = f"https://127.0.0.1:{listener.getsockname()[1]}"
    fault = remote.fault("sr_update")
    assert fault.number == 47 and "refused" in fault.text


# --- Who we are ---

def token_file(folder, text=TOKEN, mode=0o600):
    path = folder / "token"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize("command", ["sr_update", "sr_attach", "sr_probe"])
def test_wrong_token(remote, folder, command):
    remote.device_config["token_file"] = token_file(folder, "another-token-of-mine")
    fault = remote.fault(command)
    assert fault.number == 47 and "token" in fault.text and "another-token" not in fault.text


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o601])
def test_token_that_others_can_get_at_is_not_used(remote, folder, mode):
    remote.device_config["token_file"] = token_file(folder, mode=mode)
    fault = remote.fault("sr_update")
    assert fault.number == 91 and f"{mode:04o}" in fault.text and "chmod 600" in fault.text and TOKEN not in fault.text


@pytest.mark.parametrize("text", ["", "\n", "two words", "two\nlines", b"\xff\xfe", "x" * 5000, "a\0b"])
def test_what_is_no_token(remote, folder, text):
    remote.device_config["token_file"] = token_file(folder, text)
    fault = remote.fault("sr_update")
    assert fault.number == 91 and "token_file" in fault.text and len(fault.text) < 500


def test_token_file_that_is_not_there(remote, folder):
    remote.device_config["token_file"] = str(folder / "nothing")
    fault = remote.fault("sr_update")
    assert fault.number == 91 and "No such file" in fault.text


def test_token_is_in_no_log(remote, folder, monkeypatch):
    import syslog
    lines = []
    monkeypatch.setattr(syslog, "syslog", lambda priority, text: lines.append(text))
    remote.in_process = True
    remote.call("sr_update")
    remote.device_config["token_file"] = token_file(folder, TOKEN + "-and-more")
    remote.fault("sr_update")
    assert lines and not any("s3cret" in line for line in lines)


@pytest.mark.parametrize("changes, number", [
    ({"fingerprint": None}, 115), ({"token_file": None}, 115), ({"url": "http://host"}, 91), ({"url": "https://"}, 91),
    ({"url": ""}, 91), ({"url": "https://host/path"}, 91), ({"url": "https://user@host"}, 91), ({"url": "https://host:0"}, 91),
    ({"url": "https://host:99999"}, 91), ({"fingerprint": "12:34"}, 91), ({"fingerprint": "g" * 64}, 91),
    ({"token_file": "token"}, 91), ({"cacert": "ca.pem"}, 91), ({"cacert": "/nowhere.pem"}, 91), ({"socket": "/x"}, 91),
    ({"attach": "nbd"}, 91), ({"nbd_address": "host"}, 91), ({"nbd_address": "host:x"}, 91), ({"nbd_cacert": "x"}, 91),
    ({"fingerprnt": "x"}, 91),
])
def test_wrong_configuration(folder, changes, number):
    caller = Caller(in_process=True, standalone="true", **dict(KEYS, token_file=token_file(folder)))
    for key, text in changes.items():
        caller.device_config[key] = text
        if text is None:
            del caller.device_config[key]
    fault = caller.fault("sr_update")
    assert fault.number == number and "device_config" in fault.text


@pytest.mark.parametrize("url, host, port", [
    ("https://host", "host", 443), ("https://a.b-c.d:1/", "a.b-c.d", 1), ("https://[::1]:8443", "::1", 8443),
    ("https://192.0.2.7:65535", "192.0.2.7", 65535)])
def test_addresses(script, url, host, port):
    config = script.Config(dict(KEYS, url=url))
    assert (config.host, config.port) == (host, port)


# --- Where the data is ---

def test_attach_is_nbd_client_by_default(remote, host, shared):
    disk = create(remote)
    answer = remote.call("vdi_attach", ["true"], vdi=disk)
    assert (answer["params"], answer["params_nbd"]) == ("/dev/nbd0", "")
    call = host.calls()[0]
    assert call[:2] == ["nbd-client", "127.0.0.1"] and call[2].isdigit()
    assert call[3:] == ["/dev/nbd0", "-timeout", "90", "-persist", "-name", disk]
    assert TOKEN not in str(host.calls(looks=True)) and shared.pki.token_file not in str(host.calls(looks=True))
    assert remote.call("vdi_detach", vdi=disk) is NIL
    host.check_clean()


def test_tapdisk_stands_on_an_nbd_device(remote, host):
    """tapdisk's own client asks for one export name only, which a TCP port with many disks cannot know."""
    remote.device_config["attach"] = "tapdisk"
    disk = create(remote)
    answer = remote.call("vdi_attach", ["true"], vdi=disk)
    assert host.calls() == [] and answer["params_nbd"].endswith(f"{disk}:exportname={disk}")
    for _ in range(2):
        assert remote.call("vdi_activate", ["true"], vdi=disk) is NIL
    assert host.calls("tap-ctl")[-1][-2:] == ["-a", "aio:/dev/nbd0"] and len(host.calls("nbd-client")) == 1
    assert remote.call("vdi_deactivate", vdi=disk) is NIL
    host.check_clean()
    assert remote.call("vdi_detach", vdi=disk) is NIL


def test_tapdisk_that_fails_takes_the_device_below_with_it(remote, host):
    remote.device_config["attach"] = "tapdisk"
    disk = create(remote)
    remote.call("vdi_attach", ["true"], vdi=disk)
    host.plan(open=True)
    assert remote.fault("vdi_activate", ["true"], vdi=disk).number == 453
    host.check_clean()
    assert remote.call("vdi_detach", vdi=disk) is NIL


def test_nbd_through_a_tunnel(remote, host):
    remote.device_config["nbd_address"] = "127.0.0.1:1"
    disk = create(remote)
    assert remote.fault("vdi_attach", ["true"], vdi=disk).number == 46
    assert host.calls()[0][1:3] == ["127.0.0.1", "1"]
    host.check_clean()


@pytest.mark.parametrize("nbd_uri, keys, where, options", [
    ("nbd://192.0.2.7:10809/u", {}, ["192.0.2.7", "10809"], []),
    ("nbd://[2001:db8::7]:1/u", {}, ["2001:db8::7", "1"], []),
    ("nbds://h:1/u", {"nbd_cacert": "/ca.pem"}, ["h", "1"], ["-cacertfile", "/ca.pem", "-tlshostname", "h"]),
    ("nbds://h:1/u", {"nbd_address": "localhost:2"}, ["localhost", "2"], []),
    ("nbd+unix:///u?socket=/x", {"nbd_address": "[::1]:2"}, ["::1", "2"], []),
])
def test_arguments_for_nbd_client(script, nbd_uri, keys, where, options):
    call = types.SimpleNamespace(config=script.Config(dict(KEYS, **keys)))
    assert script.nbd_address(call, {}, nbd_uri) == (where, options)


@pytest.mark.parametrize("nbd_uri, word", [
    ("nbd+unix:///u?socket=/x", "--nbd-tcp"), ("nbds://h:1/u", "nbd_cacert"), ("", "--nbd-tcp")])
def test_nbd_that_cannot_be_reached(script, nbd_uri, word):
    call = types.SimpleNamespace(config=script.Config(KEYS))
    with pytest.raises(script.SmFault) as caught:
        script.nbd_address(call, {}, nbd_uri)
    assert caught.value.number == 46 and word in str(caught.value)
