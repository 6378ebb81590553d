"""The server's side of TLS: certificates out of a directory, under the names that nbdkit, libnbd and qemu use.

    server-cert.pem   our certificate, and those between it and the CA
    server-key.pem    its key, for our eyes only
    ca-cert.pem       who may vouch for clients; needed to verify them
    ca-crl.pem        certificates that were revoked; optional
"""

from __future__ import annotations

import os
import ssl
import stat

from simsr.errors import BadRequest

__all__ = ["server_context"]


def server_context(directory: str, verify_peer: bool) -> ssl.SSLContext:
    """TLS 1.2 or later with the certificates in ``directory``; with ``verify_peer`` clients must show one, too. Raises `BadRequest`."""
    key, certificate = (os.path.join(directory, name) for name in ("server-key.pem", "server-cert.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.num_tickets = 0  # nobody resumes; a ticket would be the first thing we say, before anything was asked
    authority = os.path.join(directory, "ca-cert.pem")
    wanted = [key, certificate, *([authority] if verify_peer else [])]
    problem = f"TLS certificates in {directory}"
    try:
        if stat.S_IMODE(os.stat(key).st_mode) & 0o007:
            raise BadRequest(what=problem, reason=f"{key} is open to everybody; chmod it to 0600")
        context.load_cert_chain(certificate, key, password=_no_password)
        if verify_peer:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(authority)
            revoked = os.path.join(directory, "ca-crl.pem")
            if os.path.exists(revoked):
                context.load_verify_locations(revoked)
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    except (ssl.SSLError, ValueError) as error:
        raise BadRequest(what=problem, reason=f"they cannot be used: {getattr(error, 'reason', None) or error}") from None
    except OSError as error:
        missing = [path for path in wanted if not os.access(path, os.R_OK)]  # ssl does not tell which one
        where = error.filename or ", ".join(missing) or directory
        raise BadRequest(what=problem, reason=f"{where}: {error.strerror}; 'simsr tls-setup DIR' makes them") from None
    return context


def _no_password() -> str:
    raise ValueError("the key has a password, and there is nobody to ask for it")
