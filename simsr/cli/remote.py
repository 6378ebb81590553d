"""A daemon elsewhere: its API over HTTPS, with a token and, mostly, a certificate that is known by its fingerprint.

``SIMSR_SOCKET=https://ADDRESS:PORT``, ``SIMSR_TOKEN_FILE``, and ``SIMSR_FINGERPRINT`` (SHA-256 of the certificate, hexadecimal, colons or not).
Without a fingerprint the certificate must be one that this host trusts.

With one, the certificate that the daemon shows is held against it first, and then is all that the real connection trusts. Nothing is sent before that.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import ssl
import stat
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from simsr.errors import BadRequest, DaemonUnreachable

if TYPE_CHECKING:
    import httpx

__all__ = ["is_remote", "connect", "fingerprint_of", "TOKEN_VARIABLE", "FINGERPRINT_VARIABLE"]

TOKEN_VARIABLE, FINGERPRINT_VARIABLE = "SIMSR_TOKEN_FILE", "SIMSR_FINGERPRINT"
_TOKEN_MAX = 4096


def is_remote(address: str) -> bool:
    """Whether ``address`` is a URL and not the path of a socket."""
    return address.lower().startswith("https://")


def fingerprint_of(certificate: bytes) -> str:
    """SHA-256 of a certificate (DER), as openssl prints it: pairs of digits with colons."""
    return hashlib.sha256(certificate).digest().hex(":").upper()


def connect(address: str, timeout_s: float) -> tuple[httpx.BaseTransport, str, dict[str, str]]:
    """(transport, base URL, headers) for the daemon at ``address``. Raises `BadRequest`, `DaemonUnreachable`."""
    host, port, url = _split(address)
    headers = {"Authorization": f"Bearer {_token()}"}
    fingerprint = os.environ.get(FINGERPRINT_VARIABLE)
    context = ssl.create_default_context() if not fingerprint else _pinned(address, host, port, _digest(fingerprint), timeout_s)
    import httpx

    return httpx.HTTPTransport(verify=context), url, headers


def _split(address: str) -> tuple[str, int, str]:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or 443
    except ValueError as error:
        raise BadRequest(what=f"the daemon's address {address}", reason=str(error)) from None
    if not host or parts.path not in ("", "/") or parts.query or parts.username is not None:
        raise BadRequest(what=f"the daemon's address {address}", reason="it is not of the form https://ADDRESS:PORT")
    return host, port, f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def _token() -> str:
    path = os.environ.get(TOKEN_VARIABLE)
    if not path:
        raise BadRequest(what=TOKEN_VARIABLE, reason="it must name the file with the daemon's token")
    what = f"{TOKEN_VARIABLE} {path}"
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read(_TOKEN_MAX + 1).strip() if stat.S_ISREG(mode) else b""
    except OSError as error:
        raise BadRequest(what=what, reason=os.strerror(error.errno or 0).lower()) from None
    if mode & 0o077:
        raise BadRequest(what=what, reason=f"others may use it (mode {mode & 0o777:03o}): chmod 600 it")
    if not token or len(token) > _TOKEN_MAX or not all(0x21 <= byte < 0x7F for byte in token):
        raise BadRequest(what=what, reason="there is no token in it")
    return token.decode()


def _digest(fingerprint: str) -> bytes:
    try:
        digest = bytes.fromhex(fingerprint.replace(":", "").strip())
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise BadRequest(what=f"{FINGERPRINT_VARIABLE} {fingerprint}", reason="it is not a SHA-256 in hexadecimal digits")
    return digest


def _pinned(address: str, host: str, port: int, digest: bytes, timeout_s: float) -> ssl.SSLContext:
    """A context that trusts the one certificate with this SHA-256."""
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), timeout_s) as plain, anybody.wrap_socket(plain, server_hostname=host) as secure:
            certificate = secure.getpeercert(binary_form=True) or b""
    except (OSError, ValueError) as error:
        raise DaemonUnreachable(socket=address, reason=str(getattr(error, "strerror", None) or error).lower()) from None
    if not hmac.compare_digest(hashlib.sha256(certificate).digest(), digest):
        wrong = DaemonUnreachable(
            socket=address, reason=f"its certificate has the fingerprint {fingerprint_of(certificate)}, not that of {FINGERPRINT_VARIABLE}"
        )
        wrong.hint = "Compare it with what 'simsr https-setup' printed there: somebody else may answer."
        raise wrong
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False  # it is known by its fingerprint, whatever it is called
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=certificate)
    return context
