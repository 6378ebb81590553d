"""A real simsrd for the tests of the plug-in."""

import hashlib
import re
import signal
import ssl
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

TOKEN = "s3cret-token-0123456789"


class Simsrd:
    """A real daemon on `root`, started and stopped by the test."""

    def __init__(self, root, *options):
        self.root = root
        self.options = options
        self.process = None

    def start(self):
        """Return the path of the control socket."""
        command = [sys.executable, "-m", "simsr.daemon.main", "--root", str(self.root), *self.options]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        ready = re.fullmatch(r"simsrd: ready, control socket (\S*)(, .*)?\n", line)
        assert ready, f"simsrd said {line!r}"
        return ready[1]

    def stop(self, number=signal.SIGTERM):
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(timeout=120)
            self.process.stdout.close()


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
