"""``simsr xapi serve``: arguments, sockets, signals, and the order in which things start and stop."""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import socket
import stat

import trio

from simsr.daemon.service import run_service
from simsr.errors import BadRequest
from simsr.xapi.model import FIDELITIES, Model, Settings
from simsr.xapi.server import serve_http
from simsr.xapi.storage import driver_directory

__all__ = ["main"]

READY_LINE = "simsr xapi: ready, socket "
SOCKET_PATH_MAX_BYTES = 107


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="simsr xapi serve",
        description="Serve the XenAPI of a pool with one host, and run SMAPIv1 plug-ins as xapi does.",
    )
    parser.add_argument("--root", required=True, metavar="DIR", help="where database and socket are kept; made if missing")
    parser.add_argument("--socket", metavar="PATH", help="the unix socket (default: DIR/xapi)")
    parser.add_argument("--tcp", metavar="HOST:PORT", help="serve on TCP too; loopback addresses only, needs --password-file")
    parser.add_argument("--database", metavar="FILE", help="the SQLite database (default: DIR/xapi.db)")
    parser.add_argument("--sm-dir", metavar="DIR", help="where the plug-ins are, files called *SR (default: simsr's own)")
    parser.add_argument(
        "--sm-plugins", default="*", metavar="NAMES", help="the drivers that are wanted, as in xapi.conf (default: *)"
    )
    parser.add_argument(
        "--fidelity", default="upstream", choices=FIDELITIES, help="VM.revert as xapi has it, or with its gaps filled"
    )
    parser.add_argument("--user", default="root", metavar="NAME", help="who may log in (default: root)")
    parser.add_argument("--password-file", metavar="FILE", help="file with the password; without it only the unix socket lets in")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


def _settings(arguments: argparse.Namespace, root: str) -> Settings:
    password = None
    if arguments.password_file:
        with open(arguments.password_file, encoding="utf-8") as file:
            password = file.readline().rstrip("\r\n")
        if not password:
            raise BadRequest(what=f"--password-file {arguments.password_file}", reason="its first line is empty")
    if arguments.tcp and password is None:
        raise BadRequest(what="--tcp", reason="anybody on this machine could log in; give --password-file as well")
    directory = os.path.abspath(arguments.sm_dir) if arguments.sm_dir else driver_directory()
    if not os.path.isdir(directory):
        raise BadRequest(what=f"--sm-dir {directory}", reason="there is no such directory")
    return Settings(
        database=os.path.abspath(arguments.database or os.path.join(root, "xapi.db")),
        sm_directory=directory,
        sm_plugins=arguments.sm_plugins,
        fidelity=arguments.fidelity,
        user=arguments.user,
        password=password,
    )


def _lock(root: str) -> int:
    """Make sure that nobody else serves from ``root``; the lock ends with the process."""
    lock = os.open(os.path.join(root, "xapi.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadRequest(what=f"--root {root}", reason="another 'simsr xapi serve' uses it") from None
    return lock


def _listen_unix(path: str) -> socket.socket:
    what = f"socket {path}"
    if len(os.fsencode(path)) > SOCKET_PATH_MAX_BYTES:
        raise BadRequest(what=what, reason=f"the path of a unix socket may have at most {SOCKET_PATH_MAX_BYTES} bytes")
    if os.path.lexists(path):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise BadRequest(what=what, reason="something else is there")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except OSError:
                os.unlink(path)  # left by a process that is gone
            else:
                raise BadRequest(what=what, reason="another process listens there")
    return _listen(socket.AF_UNIX, path)


def _listen_tcp(text: str) -> socket.socket:
    host, colon, port = text.rpartition(":")
    what = f"--tcp {text}"
    if not colon or not port.isdigit() or int(port) > 65535:
        raise BadRequest(what=what, reason="it is not of the form HOST:PORT")
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise BadRequest(what=what, reason=error.strerror or str(error)) from None
    if not (str(address[0]).startswith("127.") or address[0] == "::1"):
        raise BadRequest(what=what, reason="there is no TLS, so only loopback addresses are served; tunnel it (ssh -L)")
    return _listen(family, address)


def _listen(family: int, address: str | tuple) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise BadRequest(what=f"socket {address}", reason=error.strerror or str(error)) from None
    return sock


async def _serve(arguments: argparse.Namespace) -> None:
    if not arguments.root:
        raise BadRequest(what="--root ''", reason="it is empty; '.' is this directory")
    root = os.path.abspath(arguments.root)
    os.makedirs(root, mode=0o700, exist_ok=True)
    settings = _settings(arguments, root)
    path = os.path.abspath(arguments.socket or os.path.join(root, "xapi"))
    lock = _lock(root)
    listeners = [_listen_unix(path)]
    if arguments.tcp:
        listeners.append(_listen_tcp(arguments.tcp))
    stop = trio.Event()
    try:
        model = Model(settings)
        async with trio.open_nursery() as nursery:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                await nursery.start(model.run)
                await nursery.start(serve_http, model, listeners, stop)
                tcp = ", TCP {}:{}".format(*listeners[1].getsockname()[:2]) if arguments.tcp else ""
                print(f"{READY_LINE}{path}{tcp}", flush=True)
                async for _ in signals:
                    break
            stop.set()
            nursery.cancel_scope.cancel()
    finally:
        if os.path.lexists(path):
            os.unlink(path)
        os.close(lock)


def main() -> None:
    """Entry: exit status 0 after a clean stop, the error's own otherwise."""
    arguments = _parser().parse_args()
    run_service("simsr xapi", _serve, arguments)


if __name__ == "__main__":
    main()
