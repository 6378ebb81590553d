"""``simsr import`` and ``simsr export``: image files in and out, copied by qemu-img over NBD.

All or nothing: an import that does not finish deletes the VDI it made; an export writes beside its target and puts
the file in place when it is complete and on disk, so that an interrupted one leaves an older file as it was.
The uuid of an imported VDI is chosen here, so that it can be deleted even if the daemon's answer never arrived.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import time
import uuid
from collections.abc import Iterator
from typing import Any

from simsr.cli import qemu_img
from simsr.cli.client import Client
from simsr.cli.failures import DaemonAnswer, FileFailure
from simsr.cli.output import complain
from simsr.errors import BadRequest, SimsrError

__all__ = ["import_image", "export_image", "FORMAT_OF_SUFFIX", "delete_when_free", "undisturbed"]

FORMAT_OF_SUFFIX = {
    ".raw": "raw",
    ".img": "raw",
    ".qcow2": "qcow2",
    ".vhd": "vpc",
    ".vpc": "vpc",
    ".vmdk": "vmdk",
    ".vhdx": "vhdx",
    ".vdi": "vdi",
}

WRITE_OPTIONS = {"vpc": ["-o", "force_size=on"]}
"""VHD rounds sizes up to a disk geometry unless told not to."""

DETACH_TIMEOUT_S = 5.0
DETACH_POLL_S = 0.1


def import_image(
    client: Client, path: str, *, name: str | None, sr: str | None, image_format: str | None, allow_other_files: bool
) -> str:
    """Copy the image at ``path`` into a new VDI and return its uuid."""
    _check_source(path)
    info = qemu_img.image_info(path, image_format)
    if not info["virtual-size"]:
        raise FileFailure(action="import", path=path, reason="it is empty")
    others = qemu_img.files_named_inside(info, path)
    if others and not allow_other_files:
        raise FileFailure(
            action="import",
            path=path,
            reason=f"it makes qemu-img read other files: {', '.join(others)}",
            hint="If you trust it, say --allow-backing.",
        )
    client.get("/v1/srs")  # nobody there: nothing has to be taken back then
    chosen = str(uuid.uuid4())
    with _removed_unless_finished(client, chosen):
        body = {"uuid": chosen, "size_bytes": info["virtual-size"], "name": name, "sr": sr}
        vdi = client.post("/v1/vdis", body)
        # A new VDI reads as zeros, so holes need no writing; -t writeback makes qemu-img flush at the end.
        arguments = ["-n", "-W", "--target-is-zero", "-t", "writeback", "-f", info["format"], "-O", "raw"]
        source, target = os.path.abspath(path), vdi["nbd_uri"]
        qemu_img.convert([*arguments, source, target], action="import", path=path, size_bytes=info["virtual-size"])
    return chosen


def export_image(client: Client, vdi_name: str, path: str, *, image_format: str | None, force: bool) -> None:
    """Copy a VDI into the file at ``path``, in the format that its suffix or ``image_format`` says."""
    kind = image_format or _format_for(path)
    in_place = _check_target(path, force)
    vdi: dict[str, Any] = client.get(client.vdi_path(vdi_name))
    arguments = ["-t", "writeback", "-f", "raw", "-O", kind]
    if in_place:  # a block device: there is nothing to create and nothing to put in its place
        arguments += ["-n"]
        target = os.path.abspath(path)
        qemu_img.convert([*arguments, vdi["nbd_uri"], target], action="export", path=path, size_bytes=vdi["size_bytes"])
        return
    arguments += WRITE_OPTIONS.get(kind, [])
    final = os.path.realpath(path)  # a symbolic link stays, what it points to is replaced
    partial = os.path.join(os.path.dirname(final), f".simsr-export-{uuid.uuid4()}.partial")
    try:
        qemu_img.convert(
            [*arguments, vdi["nbd_uri"], partial], action="export", path=path, size_bytes=vdi["size_bytes"]
        )
        _put_in_place(partial, final, force, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def delete_when_free(client: Client, vdi_uuid: str) -> None:
    """Delete a VDI whose last client has just gone; the daemon may notice that a moment later."""
    give_up = time.monotonic() + DETACH_TIMEOUT_S
    while True:
        try:
            return client.delete(client.vdi_path(vdi_uuid))
        except DaemonAnswer as error:
            if error.code != "VdiInUse" or time.monotonic() > give_up:
                raise
        time.sleep(DETACH_POLL_S)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Hold signals back while cleaning up; a second Ctrl-C must not leave things half done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _removed_unless_finished(client: Client, vdi_uuid: str) -> Iterator[None]:
    """Delete the VDI if the body does not come to its end; the error of the body is the one to report."""
    try:
        yield
    except BaseException:
        with undisturbed():
            client.close()  # an interrupted request leaves the connection in an unknown state
            try:
                delete_when_free(client, vdi_uuid)
            except SimsrError as failure:
                if not (isinstance(failure, DaemonAnswer) and failure.code == "NotFound"):
                    complain(f"the unfinished VDI {vdi_uuid} could not be deleted: {failure}", failure.hint)
        raise


def _check_source(path: str) -> None:
    if path == "-":
        raise FileFailure(
            action="import",
            path="standard input",
            reason="qemu-img needs a file it can seek in",
            hint='Create a VDI and use: nbdcopy - "$(simsr vdi uri VDI)"',
        )
    try:
        kind = os.stat(path).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            raise FileFailure(action="import", path=path, reason="it is neither a file nor a block device")
        with open(path, "rb"):
            pass
    except OSError as error:
        raise FileFailure(action="import", path=path, reason=error.strerror or str(error)) from None


def _check_target(path: str, force: bool) -> bool:
    """Refuse what cannot or must not be written; say whether the target is a device to be written in place."""
    if path == "-":
        raise FileFailure(
            action="export",
            path="standard output",
            reason="qemu-img needs a file it can seek in",
            hint='Use: nbdcopy "$(simsr vdi uri VDI)" -',
        )
    directory = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(directory):
        raise FileFailure(action="export to", path=path, reason=f"there is no directory {directory}")
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        raise FileFailure(action="export to", path=path, reason="it is neither a file nor a block device")
    if not force:
        raise _exists(path)
    return stat.S_ISBLK(kind)


def _exists(path: str) -> FileFailure:
    return FileFailure(action="export to", path=path, reason="it exists", hint="Overwrite it with --force.")


def _format_for(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    try:
        return FORMAT_OF_SUFFIX[suffix]
    except KeyError:
        what = f"file name {os.path.basename(path)!r}"
        known = " ".join(FORMAT_OF_SUFFIX)
        raise BadRequest(what=what, reason=f"its ending is none of {known}; name the format with --format") from None


def _put_in_place(partial: str, final: str, force: bool, path: str) -> None:
    if force:
        os.replace(partial, final)
        return
    try:
        os.link(partial, final)  # unlike a rename this never replaces a file made in the meantime
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # a file system without hard links
        os.rename(partial, final)
