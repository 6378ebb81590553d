"""``simsr https-setup DIR``: a certificate, its key and a token, for ``simsrd --https``.

The certificate signs itself: who uses it knows it by its fingerprint. openssl makes it, which every host with TLS has.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
import shutil
import socket
import ssl
import subprocess
from typing import Annotated, Optional

import typer

from simsr.cli.failures import FileFailure, ToolMissing
from simsr.cli.output import print_json, say
from simsr.cli.remote import FINGERPRINT_VARIABLE, TOKEN_VARIABLE, fingerprint_of
from simsr.errors import BadRequest

__all__ = ["https_setup", "alternative_name", "make_certificate"]

VALID_DAYS = 3650
_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9-]{0,62})(\.[A-Za-z0-9-]{1,63})*")


def alternative_name(name: str) -> str:
    """``name`` as a certificate's subjectAltName has it. Raises `BadRequest`."""
    try:
        return f"IP:{ipaddress.ip_address(name)}"
    except ValueError:
        if not _NAME.fullmatch(name):
            raise BadRequest(what=f"the name {name!r}", reason="it is neither a host name nor an address") from None
        return f"DNS:{name}"


def make_certificate(certificate: str, key: str, names: list[str]) -> str:
    """Write a certificate for ``names``, signed by itself, and its key (mode 0600); return its SHA-256 fingerprint.

    Raises `ToolMissing`, `FileFailure`, `BadRequest`.
    """
    openssl = shutil.which("openssl")
    if openssl is None:
        raise ToolMissing(tool="openssl", action="making a certificate", hint="On Debian and Ubuntu: apt-get install openssl")
    command = [
        openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-sha256", "-days", str(VALID_DAYS),
        "-subj", "/CN=simsrd", "-addext", f"subjectAltName={','.join(map(alternative_name, names))}", "-addext", "basicConstraints=critical,CA:FALSE",
        "-keyout", key, "-out", certificate,
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, umask=0o077)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"openssl ended with status {done.returncode}"])[-1]
        raise FileFailure(action="make the certificate", path=certificate, reason=reason)
    try:
        with open(certificate) as file:
            return fingerprint_of(ssl.PEM_cert_to_DER_cert(file.read()))
    except ValueError:  # openssl does not notice that the disk is full
        raise FileFailure(action="make the certificate", path=certificate, reason="openssl has not written all of it; is the disk full?") from None


def https_setup(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where to put cert.pem, key.pem and token; made if missing.")],
    name: Annotated[
        Optional[list[str]], typer.Option("--name", metavar="NAME", help="Host name or address of the daemon; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a certificate and a token for simsrd --https, and print the fingerprint."""
    paths = {kind: os.path.join(os.path.abspath(directory), kind) for kind in ("cert.pem", "key.pem", "token")}
    names = list(dict.fromkeys(name or [socket.gethostname(), "localhost", "127.0.0.1"]))
    for one in names:
        alternative_name(one)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        for path in paths.values():
            if os.path.lexists(path):
                raise FileFailure(action="write", path=path, reason="it exists already", hint="Choose another directory, or remove it.")
        try:
            fingerprint = make_certificate(paths["cert.pem"], paths["key.pem"], names)
            with open(os.open(paths["token"], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
        except BaseException:  # a full disk, Ctrl-C: the next run must not find half of it
            for path in paths.values():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            raise
    except OSError as error:
        raise FileFailure(action="write", path=error.filename or directory, reason=(error.strerror or str(error)).lower()) from None
    if as_json:
        return print_json({"fingerprint": fingerprint, **{kind.replace(".", "_"): path for kind, path in paths.items()}, "names": names})
    print(fingerprint)
    say(f"Start the daemon:  simsrd --root DIR --https {names[0]}:8443 --https-cert {paths['cert.pem']} "
        f"--https-key {paths['key.pem']} --token-file {paths['token']}")  # fmt: skip
    say(f"Use it elsewhere:  export SIMSR_SOCKET=https://{names[0]}:8443 {TOKEN_VARIABLE}=FILE {FINGERPRINT_VARIABLE}={fingerprint}")
