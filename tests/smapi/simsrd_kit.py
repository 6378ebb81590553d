"""What a simsrd needs that listens for HTTPS."""

import hashlib
import ssl
import subprocess
from pathlib import Path
from types import SimpleNamespace

TOKEN = "s3cret-token-0123456789"


def make_pki(folder):
    """Make a certificate for 127.0.0.1, its key and a token; return their paths, the fingerprint and the token."""
    certificate, key, token_file = (str(folder / name) for name in ("cert.pem", "key.pem", "token"))
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30",
               "-subj", "/CN=simsrd", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True, umask=0o077)
    der = ssl.PEM_cert_to_DER_cert(Path(certificate).read_text())
    Path(token_file).touch(0o600)
    Path(token_file).write_text(TOKEN + "\n")
    return SimpleNamespace(certificate=certificate, key=key, token_file=token_file, fingerprint=hashlib.sha256(der).hexdigest())
