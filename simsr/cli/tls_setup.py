"""``simsr tls-setup DIR``: a certificate authority and certificates for NBD over TLS, made by openssl.

    DIR/ca-cert.pem, ca-key.pem             the authority; its key signs further clients and may be kept elsewhere
    DIR/server-cert.pem, server-key.pem     for ``simsrd --nbd-tls-dir DIR``
    DIR/clients/NAME/                       ca-cert.pem, client-cert.pem, client-key.pem for a client's tls-certificates directory

The names are those that nbdkit, libnbd and qemu look for. What is there already stays; so a second run adds clients.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Optional

import typer

from simsr.cli.failures import FileFailure, ToolMissing
from simsr.cli.https_setup import alternative_name
from simsr.cli.output import say
from simsr.errors import BadRequest

__all__ = ["tls_setup"]

_DAYS = "3650"
_CLIENT = re.compile(r"[A-Za-z0-9_@][A-Za-z0-9 ._@-]{0,63}")
_CONFIGURATION = "[req]\ndistinguished_name=dn\n[dn]\n"  # nothing of the system's own, which differs
_CAN_SIGN = ("basicConstraints=critical,CA:TRUE,pathlen:0", "keyUsage=critical,keyCertSign,cRLSign")
_CANNOT = ("basicConstraints=critical,CA:FALSE", "keyUsage=critical,digitalSignature,keyEncipherment")


def tls_setup(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where to put the certificates; made if missing.")],
    name: Annotated[
        Optional[list[str]], typer.Option("--name", metavar="NAME", help="Host name or address of the server; may be repeated.")
    ] = None,
    client: Annotated[
        Optional[list[str]], typer.Option("--client", metavar="NAME", help="Make a certificate for this client; may be repeated.")
    ] = None,
) -> None:
    """Make certificates for NBD over TLS: an authority, the server's, and one for each client."""
    for one in client or ():
        if not _CLIENT.fullmatch(one):
            raise BadRequest(what=f"the client name {one!r}", reason="it may have 64 letters, digits and ' ._@-'")
    names = list(dict.fromkeys(name or [socket.gethostname(), "localhost", "127.0.0.1", "::1"]))
    alternatives = ",".join(map(alternative_name, names))
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        made = _make_all(directory, alternatives, bool(name), client or [])
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise FileFailure(action="write", path=error.filename or directory, reason=reason) from None
    say("made " + ", ".join(made) if made else "there is nothing to make: name further clients with --client NAME")
    if "server-cert.pem" in made:
        say(f"Start the daemon:  simsrd --root ROOT --nbd-tls-dir {os.path.abspath(directory)} --tls-verify-peer --nbd-tcp HOST:10809")
    for one in client or ():
        folder = os.path.join(os.path.abspath(directory), "clients", one)
        say(f"Use it as {one}:  nbdinfo 'nbds://{names[0]}/VDI?tls-certificates={folder}'")


def _make_all(directory: str, alternatives: str, names_given: bool, clients: list[str]) -> list[str]:
    """Make what is missing; returns the names of what was made."""
    made = []
    authority = os.path.join(directory, "ca")
    if not os.path.exists(authority + "-cert.pem"):
        with _certificate(directory, "ca", "/CN=simsr certificate authority", _CAN_SIGN):
            made.append("ca-cert.pem")
    if not os.path.exists(os.path.join(directory, "server-cert.pem")):
        extensions = (*_CANNOT, "extendedKeyUsage=serverAuth", f"subjectAltName={alternatives}")
        with _certificate(directory, "server", "/CN=simsrd", extensions, authority):
            made.append("server-cert.pem")
    elif names_given:
        path = os.path.join(directory, "server-cert.pem")
        raise FileFailure(action="write", path=path, reason="it exists already", hint="Remove it and server-key.pem to have another.")
    for client in clients:
        folder = os.path.join(directory, "clients", client)
        if os.path.exists(os.path.join(folder, "client-cert.pem")):
            continue
        os.makedirs(folder, mode=0o700, exist_ok=True)
        extensions = (*_CANNOT, "extendedKeyUsage=clientAuth")
        with _certificate(folder, "client", f"/CN={client}", extensions, authority):
            shutil.copyfile(authority + "-cert.pem", os.path.join(folder, "ca-cert.pem"))
        made.append(os.path.join("clients", client))
    return made


@contextmanager
def _certificate(folder: str, kind: str, subject: str, extensions: tuple[str, ...], authority: str | None = None) -> Iterator[None]:
    """Make a key (mode 0600) and a certificate, signed by ``authority`` or by itself; both are in place after the block, or neither."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise ToolMissing(tool="openssl", action="making a certificate", hint="On Debian and Ubuntu: apt-get install openssl")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        key, certificate = (os.path.join(temporary, part) for part in ("key", "cert"))
        signed_by = ["-CA", authority + "-cert.pem", "-CAkey", authority + "-key.pem"] if authority else []
        done = subprocess.run(
            [
                openssl, "req", "-x509", "-config", "/dev/stdin", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                "-sha256", "-days", _DAYS, "-subj", subject, *(part for one in extensions for part in ("-addext", one)),
                *signed_by, "-keyout", key, "-out", certificate,
            ],
            input=_CONFIGURATION, capture_output=True, text=True, umask=0o077,
        )  # fmt: skip
        if done.returncode:
            lines = [line for line in done.stderr.strip().splitlines() if "error" in line.lower() or "open" in line.lower()]
            reason = (lines or [f"openssl ended with status {done.returncode}"])[-1]
            raise FileFailure(action="make the certificate", path=os.path.join(folder, f"{kind}-cert.pem"), reason=reason)
        yield
        os.rename(key, os.path.join(folder, f"{kind}-key.pem"))
        os.rename(certificate, os.path.join(folder, f"{kind}-cert.pem"))
