"""``simsrd``: arguments, signals, and the order in which things start and stop."""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import stat
import sys
from typing import Any

import trio

from nbd_export.server import is_local, listen_tcp, listen_unix
from nbd_export.tls import server_context
from simsr import __version__
from simsr.daemon.api import make_app
from simsr.daemon.host import Host
from simsr.daemon.listeners import https_from, serve_https, serve_unix, split_address
from simsr.daemon.mounts import CACHES
from simsr.daemon.service import run_service
from simsr.daemon.systemd import listen_fds, notify
from simsr.errors import BadRequest
from simsr.store.hot import HOT_MEMORY_BYTES
from simsr.units import format_size, parse_size

__all__ = ["main"]

log = logging.getLogger("simsr.main")

MAP_MEMORY_MIN_BYTES = 4 << 20

SWITCH_INTERVAL_S = 0.0005
"""How long a worker thread may keep Python's interpreter lock while trio's thread wants it. The default of 5 ms is the worst
delay that a checkpoint could add to a request."""

_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES = -3, 256 << 10

GC_THRESHOLDS = (50_000, 50, 1000)
"""Maps are many objects without cycles. With Python's defaults the collector would walk them all again and again."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="simsrd", description="The simsr daemon: copy-on-write disks over NBD.")
    parser.add_argument("--root", required=True, metavar="DIR", help="where everything is kept; made if missing")
    parser.add_argument("--socket", metavar="PATH", help="control socket (default: DIR/control.sock)")
    parser.add_argument("--nbd-socket", metavar="PATH", help="NBD socket for all VDIs (default: DIR/nbd.sock)")
    parser.add_argument("--nbd-tcp", metavar="HOST:PORT", help="serve NBD on TCP too; with TLS only, unless on a loopback address")
    parser.add_argument("--nbd-tls-dir", metavar="DIR", help="certificates for NBD: server-cert.pem, server-key.pem, ca-cert.pem")
    parser.add_argument(
        "--tls", choices=["off", "on", "require"], help="whether NBD clients may or must use TLS (default: on, if there are certificates)"
    )
    parser.add_argument("--tls-verify-peer", action="store_true", help="NBD clients must show a certificate that ca-cert.pem vouches for")
    parser.add_argument("--nbd-connections", type=int, default=0, metavar="N", help="close further NBD connections (default: no limit)")
    parser.add_argument("--exit-with-parent", action="store_true", help="stop when the process that started simsrd has ended")
    parser.add_argument("--https", metavar="ADDRESS:PORT", help="serve the control API over TLS too, to those who know the token")
    parser.add_argument("--https-cert", metavar="FILE", help="certificate for --https, PEM ('simsr https-setup' makes one)")
    parser.add_argument("--https-key", metavar="FILE", help="its private key, which nobody else may read")
    parser.add_argument("--token-file", metavar="FILE", help="the token for --https, in a file that nobody else may read")
    parser.add_argument(
        "--map-memory", default="256MiB", metavar="SIZE", help="memory for extent maps, all SRs together (default: 256MiB)"
    )
    parser.add_argument(
        "--hot-memory", default=str(HOT_MEMORY_BYTES), metavar="SIZE",
        help="memory to keep what is read much in, all SRs together; 0: none (default: an eighth of the machine's)",
    )  # fmt: skip
    parser.add_argument("--mount", metavar="DIR", help="show all VDIs as files below DIR (FUSE)")
    parser.add_argument(
        "--mount-cache", default="direct", choices=CACHES, help="who caches what is below DIR: nobody, or the kernel (default: direct)"
    )
    parser.add_argument("--mount-shared", action="store_true", help="let the daemon's group read and write below DIR, too")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.add_argument("--version", action="version", version=f"simsrd {__version__}")
    return parser


def _map_memory(text: str) -> int:
    size_bytes = parse_size(text)
    if size_bytes < MAP_MEMORY_MIN_BYTES:
        raise BadRequest(what=f"--map-memory {text}", reason=f"at least {format_size(MAP_MEMORY_MIN_BYTES)} are needed")
    return size_bytes


def _hot_memory(text: str) -> int:
    return 0 if text.strip() == "0" else parse_size(text)


def _sort_passed(fds: list[int]) -> tuple[int | None, list[socket.socket]]:
    """systemd's sockets: the one whose path ends in control.sock (or the first unix one) is for control, the others for NBD."""
    control, others = None, []
    for fd in fds:
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        name = sock.getsockname()
        if control is None and sock.family == socket.AF_UNIX and (len(fds) == 1 or str(name).endswith("control.sock")):
            control = sock.detach()
        else:
            others.append(sock)
    return control, others


def _listeners(arguments: argparse.Namespace, host: Host, passed: list[socket.socket]) -> tuple[list[socket.socket], str | None]:
    listeners, tcp = list(passed), None
    if not any(sock.family == socket.AF_UNIX for sock in passed):
        _free_socket_path(host.nbd_socket, "NBD socket")
        listeners.append(listen_unix(host.nbd_socket))
    for sock in passed:
        _refuse_without_tls("the TCP socket from systemd", sock, host)
    if arguments.nbd_tcp:
        what = f"--nbd-tcp {arguments.nbd_tcp}"
        try:
            sock = listen_tcp(*split_address("--nbd-tcp", arguments.nbd_tcp))
        except OSError as error:
            raise BadRequest(what=what, reason=error.strerror or str(error)) from None
        _refuse_without_tls(what, sock, host)
        listeners.append(sock)
        tcp = "{}:{}".format(*sock.getsockname()[:2])
    return listeners, tcp


def _refuse_without_tls(what: str, sock: socket.socket, host: Host) -> None:
    if not is_local(sock) and host.nbd.tls_mode == "off":
        raise BadRequest(what=what, reason="plain NBD is served on loopback addresses only; give --nbd-tls-dir, or tunnel it (ssh -L)")


def _nbd_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of the NBD server. Raises `BadRequest`."""
    directory, mode = arguments.nbd_tls_dir, arguments.tls or ("on" if arguments.nbd_tls_dir else "off")
    if mode != "off" and not directory:
        raise BadRequest(what=f"--tls {mode}", reason="it needs certificates: give --nbd-tls-dir ('simsr tls-setup DIR' makes them)")
    if arguments.tls_verify_peer and mode == "off":
        raise BadRequest(what="--tls-verify-peer", reason="there is no TLS without --nbd-tls-dir")
    if arguments.nbd_connections < 0:
        raise BadRequest(what=f"--nbd-connections {arguments.nbd_connections}", reason="it is negative")
    tls = server_context(directory, arguments.tls_verify_peer) if mode != "off" else None
    return {"tls": tls, "tls_required": mode == "require", "connections_max": arguments.nbd_connections}


def _free_socket_path(path: str, what: str) -> None:
    """Raise `BadRequest` if no socket can be made at ``path``. One that nobody listens on any more is no obstacle."""
    what = f"{what} {path}"
    if len(os.fsencode(path)) > 107:
        raise BadRequest(what=what, reason="the path of a unix socket may have at most 107 bytes")
    if not os.path.isdir(os.path.dirname(path)):
        raise BadRequest(what=what, reason="there is no such directory")
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise BadRequest(what=what, reason="something else is there")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return
    raise BadRequest(what=what, reason="another process listens there")


def _watch_parent() -> int:
    """A descriptor that becomes readable when the process that started this one ends. Raises `BadRequest`, OSError."""
    parent = os.getppid()
    if parent == 1:
        raise BadRequest(what="--exit-with-parent", reason="the process that started simsrd has ended already")
    parent_fd = os.pidfd_open(parent)
    if os.getppid() != parent:  # it ended, and the descriptor may be of somebody else
        raise BadRequest(what="--exit-with-parent", reason="the process that started simsrd has just ended")
    return parent_fd


async def _stop_with_parent(parent_fd: int) -> None:
    await trio.lowlevel.wait_readable(parent_fd)
    logging.getLogger("simsr").info("the process that started simsrd has ended")
    os.kill(os.getpid(), signal.SIGTERM)


async def _serve(arguments: argparse.Namespace) -> None:
    if not arguments.root:
        raise BadRequest(what="--root ''", reason="it is empty; '.' is this directory")
    parent_fd = _watch_parent() if arguments.exit_with_parent else None
    control_fd, passed = _sort_passed(listen_fds())
    if control_fd is not None and arguments.socket:
        raise BadRequest(what="--socket", reason="systemd passed the control socket already")
    host = Host(
        arguments.root, arguments.nbd_socket, _map_memory(arguments.map_memory), hot_memory_bytes=_hot_memory(arguments.hot_memory),
        **_nbd_options(arguments),
    )  # fmt: skip
    https = https_from(arguments)
    host.prepare()
    control = None if control_fd is not None else os.path.abspath(arguments.socket or os.path.join(host.root, "control.sock"))
    if control is not None:
        _free_socket_path(control, "control socket")
    passed_nbd = [sock.getsockname() for sock in passed if sock.family == socket.AF_UNIX]
    if passed_nbd:
        host.nbd_socket = passed_nbd[0]
    listeners, tcp = _listeners(arguments, host, passed)
    host.nbd_tcp = tcp
    bind = f"unix:{control}" if control else f"fd://{control_fd}"
    address = https.address if https else None
    stop = trio.Event()
    try:
        async with trio.open_nursery() as nursery:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                if parent_fd is not None:
                    nursery.start_soon(_stop_with_parent, parent_fd)
                await nursery.start(host.run, listeners)
                app = make_app(host, control, tcp, address)
                await nursery.start(serve_unix, app, bind, stop)
                if https is not None:
                    await nursery.start(serve_https, app, https, stop)
                    log.info("control API on %s", address)
                if arguments.mount:
                    await host.mounts.mount(os.path.abspath(arguments.mount), arguments.mount_cache, arguments.mount_shared)
                print(f"simsrd: ready, control socket {control or 'from systemd'}", flush=True)
                notify("READY=1")
                async for _ in signals:
                    break
            notify("STOPPING=1")
            await host.mounts.stop()
            stop.set()
            nursery.cancel_scope.cancel()
    finally:
        for path in (control, None if passed_nbd else host.nbd_socket):  # systemd's sockets outlive us
            if path and os.path.exists(path):
                os.unlink(path)


def _give_large_blocks_back() -> None:
    """Keep glibc from raising, with every large block that is freed, the size from which freed blocks go back to the kernel: after
    the load of a large map the process would stay as large as it was at its largest (mallopt(3), M_MMAP_THRESHOLD)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


def main() -> None:
    """Entry of ``simsrd``: exit status 0 after a clean stop, the error's own otherwise."""
    arguments = _parser().parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _give_large_blocks_back()
    gc.set_threshold(*GC_THRESHOLDS)
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK):
        soft, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))
    run_service("simsrd", _serve, arguments)


if __name__ == "__main__":
    main()
