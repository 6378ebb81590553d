"""The control API over HTTPS: nobody without the token, nothing too large, nothing in the clear; and what is refused at the start."""

import argparse
import os
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
import trio
from api_daemon import MIB, check_error
from daemon_tools import running_simsrd, simsrd_command

from simsr.daemon import listeners
from simsr.daemon.listeners import BODY_MAX_BYTES, HEAD_MAX_BYTES, Limits, TokenRequired, https_from, split_address
from simsr.errors import BadRequest

TOKEN = "0123456789abcdef-token"


def write(path, text, mode=0o600):
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        file.write(text)
    os.chmod(path, mode)
    return str(path)


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """A certificate, its key, and a token."""
    folder = tmp_path_factory.mktemp("pki")
    certificate, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30", "-subj",
               "/CN=simsrd", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, umask=0o077)
    return argparse.Namespace(https="127.0.0.1:0", https_cert=certificate, https_key=key, token_file=write(folder / "token", TOKEN + "\n"))


class Remote:
    """A daemon on this host, as somebody elsewhere sees it."""

    def __init__(self, simsrd, pki):
        self.simsrd = simsrd
        self.url = simsrd.get("/v1/daemon")["https"]
        self.port = int(self.url.rpartition(":")[2])
        self.context = ssl.create_default_context(cafile=pki.https_cert)

    def client(self, token=TOKEN, **how):
        headers = [] if token is None else [("authorization", f"Bearer {token}")]
        return httpx.Client(base_url=self.url, verify=self.context, headers=headers, timeout=120, **how)

    def raw(self, data):
        """What is answered to ``data`` until the daemon hangs up."""
        with socket.create_connection(("127.0.0.1", self.port), 120) as plain, self.context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
            answer = b""
            try:
                secure.sendall(data)  # which fails when the daemon has heard enough
                while piece := secure.recv(65536):
                    answer += piece
            except (ConnectionError, ssl.SSLError):
                pass
            return answer


@pytest.fixture(scope="module")
def remote(pki):
    options = ["--https", pki.https, "--https-cert", pki.https_cert, "--https-key", pki.https_key, "--token-file", pki.token_file]
    with running_simsrd(*options, "--nbd-tcp", "127.0.0.1:0") as simsrd:
        simsrd.create_sr()
        yield Remote(simsrd, pki)
        simsrd.stop_cleanly()
        assert TOKEN not in simsrd.log


def test_with_the_token_everything_is_as_on_the_socket(remote):
    with remote.client() as client:
        made = client.post("/v1/vdis", json={"size_bytes": MIB, "name": "afar"})
        assert made.status_code == 201
        vdi = made.json()
        assert client.get("/v1/vdis/afar").json() == vdi
        address = remote.simsrd.get("/v1/daemon")["nbd_tcp"]
        attached = client.post("/v1/vdis/afar/attach", json={"client": "a", "writable": True}).json()
        assert vdi["nbd_uri"] == attached["nbd_uri"] == f"nbd://{address}/{vdi['uuid']}"
        here = remote.simsrd.get("/v1/vdis/afar")
        assert here["nbd_uri"].startswith("nbd+unix:") and {**here, "nbd_uri": vdi["nbd_uri"], "attached": []} == vdi
        assert client.get("/v1/vdis", params={"sr": "sr"}).json()[0]["nbd_uri"] == vdi["nbd_uri"]
        assert client.post("/v1/vdis/afar/detach", json={"client": "a"}).status_code == 204
        assert client.delete("/v1/vdis/afar").status_code == 204
        check_error(client.get("/v1/vdis/afar"), "NotFound")


@pytest.mark.parametrize("token", [None, "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper()])
def test_wrong_tokens(remote, token):
    with remote.client(token) as client:
        for method, path in (("GET", "/v1/daemon"), ("POST", "/v1/srs"), ("GET", "/openapi.json"), ("GET", "/nothing")):
            answer = client.request(method, path)
            error = check_error(answer, "NotAllowed", 401)
            assert answer.headers["www-authenticate"].startswith("Bearer") and TOKEN not in error["message"]
    assert len(remote.simsrd.get("/v1/srs")) == 1


@pytest.mark.parametrize("headers", [
    [("authorization", "Bearer x"), ("authorization", f"Bearer {TOKEN}")], [("authorization", f"Basic {TOKEN}")], [("authorization", TOKEN)],
    [("x-authorization", f"Bearer {TOKEN}")],
])  # fmt: skip
def test_wrong_headers(remote, headers):
    with remote.client(None) as client:
        check_error(client.get("/v1/daemon", headers=headers), "NotAllowed", 401)


def test_who_has_no_token_sends_no_body(remote):
    head = b"POST /v1/srs HTTP/1.1\r\nhost: x\r\ncontent-length: 900000\r\n\r\n"
    answer = remote.raw(head)
    assert answer.startswith(b"HTTP/1.1 401 ") and b"connection: close" in answer.lower()


def test_tls(remote):
    with socket.create_connection(("127.0.0.1", remote.port), 120) as plain:
        plain.sendall(b"GET /v1/daemon HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200" not in plain.recv(4096), "plain HTTP gets nothing"
    old = ssl.create_default_context()
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection(("127.0.0.1", remote.port), 120) as plain, pytest.raises(ssl.SSLError):
        old.wrap_socket(plain)
    with remote.client() as client:
        assert client.get("/v1/daemon").status_code == 200, "it goes on after all of that"


def clients(remote):
    transport = httpx.HTTPTransport(uds=remote.simsrd.socket)
    return remote.client(), httpx.Client(transport=transport, base_url="http://simsrd", timeout=120)


def test_large_bodies(remote):
    for client in clients(remote):
        with client:
            big = b'{"name": "%s"}' % (b"x" * BODY_MAX_BYTES)
            error = check_error(client.post("/v1/srs", content=big), "TooLarge", 413)
            assert str(BODY_MAX_BYTES) in error["message"]
            check_error(client.post("/v1/srs", content=iter([big[:70000]] * 20)), "TooLarge", 413)
            just = b'{"name": "%s"}' % (b"x" * (BODY_MAX_BYTES - 12))
            assert len(just) == BODY_MAX_BYTES
            check_error(client.post("/v1/srs", content=just), "BadRequest", 400)
            assert client.get("/v1/daemon").status_code == 200


def test_large_heads(remote):
    answer = remote.raw(b"GET /v1/daemon HTTP/1.1\r\nhost: x\r\nx: " + b"y" * (4 * HEAD_MAX_BYTES) + b"\r\n\r\n")
    assert b" 200 " not in answer.split(b"\r\n")[0]


def test_a_websocket_is_not_let_in(remote):
    head = "GET /v1/daemon HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    assert remote.raw(head.encode() + b"\r\n").startswith(b"HTTP/1.1 403 ")


# Without a daemon.


async def called(app, body=(), headers=(), **scope):
    """The answer of an ASGI application to a request whose body comes in the pieces ``body``; "stop" is a client that sends no more."""
    sent, pieces = [], list(body)

    async def receive():
        piece = pieces.pop(0) if pieces else None
        if piece == "stop":
            await trio.sleep_forever()
        if piece is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message):
        sent.append(message)

    await app({"type": "http", "headers": list(headers), **scope}, receive, send)
    return sent


async def echo(scope, receive, send):
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


async def test_a_body_that_comes_in_pieces():
    assert (await called(Limits(echo), [b"ab", b"", b"cd"]))[1]["body"] == b"abcd"


async def test_a_body_that_does_not_come(autojump_clock):
    start, body = await called(Limits(echo), [b"ab", "stop"])
    assert start["status"] == 400 and b"30 s" in body["body"] and (b"connection", b"close") in start["headers"]


async def test_a_client_that_goes_away():
    assert await called(Limits(echo), [b"ab", None]) == []


@pytest.mark.parametrize("length", [b"1048577", b"9" * 4000])
async def test_a_body_that_is_announced_too_large(length):
    start, _ = await called(Limits(echo), ["stop"], [(b"content-length", length)])
    assert start["status"] == 413


async def test_what_is_compared(monkeypatch):
    compared = []
    monkeypatch.setattr(listeners.hmac, "compare_digest", lambda *pair: compared.append(pair))
    await called(TokenRequired(echo, b"right"), [b""], [(b"authorization", b"bearer  left ")])
    assert compared == [(b"left", b"right")]


def changed(pki, **changes):
    return argparse.Namespace(**{**vars(pki), **changes})


def test_what_is_needed_to_listen(pki):
    assert https_from(argparse.Namespace(https=None, https_cert=None, https_key=None, token_file=None)) is None
    https = https_from(pki)
    with https.listener:
        assert https.token == TOKEN.encode() and https.address == f"https://127.0.0.1:{https.listener.getsockname()[1]}"
        busy = changed(pki, https=f"127.0.0.1:{https.listener.getsockname()[1]}")
        with pytest.raises(BadRequest, match="in use"):
            https_from(busy)
    for option in vars(pki):
        with pytest.raises(BadRequest, match=f"--{option.replace('_', '-')} must be given"):
            https_from(changed(pki, **{option: None}))


@pytest.mark.parametrize("text, mode, reason", [
    (TOKEN, 0o640, "others may use it"), (TOKEN, 0o604, "chmod 600"), ("short", 0o600, "one word of 16"), ("", 0o600, "one word"),
    ("two words " * 5, 0o600, "one word"), ("ü" * 40, 0o600, "printable"), ("x" * 5000, 0o600, "4096"),
])  # fmt: skip
def test_bad_token_files(pki, tmp_path, text, mode, reason):
    path = write(tmp_path / "token", text, mode)
    with pytest.raises(BadRequest, match=reason) as caught:
        https_from(changed(pki, token_file=path))
    assert not text or text not in caught.value.details["reason"]


def test_other_things_that_are_no_files(pki, tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path, reason in ((tmp_path / "fifo", "not a file"), (tmp_path, "directory|not a file"), (tmp_path / "none", "no such file")):
        with pytest.raises(BadRequest, match=reason):
            https_from(changed(pki, token_file=str(path)))
    garbage = write(tmp_path / "garbage", "garbage")
    open_key = write(tmp_path / "key", Path(pki.https_key).read_text(), 0o644)
    for changes, reason in (
        ({"https_cert": garbage}, "https-cert"), ({"https_key": garbage}, "https-key"), ({"https_key": open_key}, "others may use it"),
        ({"https_cert": str(tmp_path / "none")}, "no such file"), ({"https": "127.0.0.1"}, "HOST:PORT"), ({"https": "256.0.0.1:1"}, "--https"),
    ):  # fmt: skip
        with pytest.raises(BadRequest, match=reason):
            https_from(changed(pki, **changes))


def test_addresses():
    assert split_address("--x", "[::1]:80") == ("::1", 80) and split_address("--x", "a.b:0") == ("a.b", 0)
    for text in ("", ":1", "a", "a:", "a:b", "a:65536", "a:-1", "a:１"):
        with pytest.raises(BadRequest, match="--x"):
            split_address("--x", text)


def test_the_daemon_does_not_start_with_less(pki, folder):
    done = subprocess.run(simsrd_command("--root", f"{folder}/r", "--https", "127.0.0.1:0"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--https-cert and --https-key and --token-file must be given" in done.stderr
    assert "Traceback" not in done.stderr and not os.path.exists(f"{folder}/r")
