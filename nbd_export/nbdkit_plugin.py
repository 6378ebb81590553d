"""A plug-in for nbdkit that serves the disks of a running simsrd, so that nbdkit's filters stack on them.

    nbdkit python nbd_export/nbdkit_plugin.py socket=/run/simsr/nbd.sock export=NAME

nbdkit loads this file by itself, with the system's Python: it needs libnbd's module and nothing of simsr. Parameters and examples: docs/nbdkit.md.

Theory. Every client of nbdkit gets a few connections to simsrd, because one handle of libnbd carries one request at a time and nbdkit calls us from many
threads (libnbd lets go of the interpreter while it waits). simsrd promises that a flush on one connection covers what was answered on all
(multi-conn). All are opened at once and none is ever replaced: writes that were not flushed are lost when simsrd dies, so a client must
learn of that and connect anew; a connection made behind its back would let a later flush succeed over the loss.
"""

import difflib
import errno
import functools
import http.client
import json
import os
import queue
import socket
import sys
import urllib.parse

try:
    import nbd
except ImportError:  # nbdkit's Python takes its library from the first python3 on PATH, which may be another than the system's
    sys.path.append("/usr/lib/python3/dist-packages")
    import nbd
import nbdkit

API_VERSION = 2
REQUEST_MAX_BYTES = 32 << 20  # what simsrd takes in one read or write
ALLOCATION = "base:allocation"
SOCKET_PATH_MAX_BYTES = 107  # sun_path of Linux, without the terminating NUL
CONNECTIONS_MAX = 16
TIMEOUT_S = 60  # for an answer of the control API

PARAMETERS = {
    "socket": "/run/simsr/nbd.sock",
    "export": "",
    "sr": "",
    "control": "",
    "connections": "4",
}
_given = {}
_settings = dict(PARAMETERS)

sys.tracebacklimit = 0  # nbdkit prints the traceback of every exception, also of those that only tell a client "no"


# --- Parameters ----------------------------------------------------------------------------------------------------

def _refuse(reason):
    """End nbdkit with a sentence; an exception would be shown as a traceback."""
    sys.stderr.write("nbdkit: error: simsr: %s\n" % reason)
    sys.stderr.flush()
    os._exit(1)


def config(key, value):
    if key not in PARAMETERS:
        near = difflib.get_close_matches(key, PARAMETERS, 1)
        hint = "did you mean %s=?" % near[0] if near else "there are %s" % ", ".join(name + "=" for name in PARAMETERS)
        _refuse("the parameter %s= is not known; %s" % (key, hint))
    if key in _given:
        _refuse("the parameter %s= is given twice" % key)
    _given[key] = value


def config_complete():
    _settings.update(_given)
    for key in ("socket", "control"):
        if key in _given and not _settings[key]:
            _refuse("%s= is empty; it must be the path of a socket" % key)
    _settings["socket"] = os.path.abspath(_settings["socket"])
    if _settings["control"] and not _settings["sr"]:
        _refuse("control= is of use with sr= only")
    _settings["control"] = os.path.abspath(
        _settings["control"] or os.path.join(os.path.dirname(_settings["socket"]), "control.sock"))
    for key in ("socket", "control"):
        if len(os.fsencode(_settings[key])) > SOCKET_PATH_MAX_BYTES:
            _refuse("%s=%s is longer than the %d bytes of a socket's path" % (key, _settings[key], SOCKET_PATH_MAX_BYTES))
    text = _settings["connections"]
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= CONNECTIONS_MAX):
        _refuse("connections=%s is not a number from 1 to %d" % (text, CONNECTIONS_MAX))
    for key in ("export", "sr"):
        if key in _given and not _settings[key]:
            _refuse("%s= is empty; leave it out, or name one" % key)


def get_ready():
    """Before nbdkit serves: what is not there is said now, rather than to every client."""
    try:
        if _settings["export"]:
            _close(_connect(_resolved(_settings["export"])))
        else:
            _close(_listing_handle())
            if _settings["sr"]:
                _disks_of_sr()
    except nbd.Error as error:
        _refuse("simsrd's export cannot be opened at %s: %s" % (_settings["socket"], error.string))
    except OSError as error:
        _refuse(error.strerror)


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


# --- simsrd --------------------------------------------------------------------------------------------------------

def _disks_of_sr():
    """[(uuid, name)] of the SR in sr=. Raises OSError."""
    target = "/v1/vdis?sr=" + urllib.parse.quote(_settings["sr"], "")
    connection = http.client.HTTPConnection("localhost")
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.settimeout(TIMEOUT_S)
            sock.connect(_settings["control"])
            connection.sock = sock
            connection.request("GET", target, headers={"Connection": "close"})
            response = connection.getresponse()
            answer = json.loads(response.read().decode())
            if response.status == 200:
                return [(vdi["uuid"], vdi["name"]) for vdi in answer]
            reason = answer["error"]["message"]
        except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
            raise OSError(errno.EIO, "simsrd cannot be asked at %s: %s" % (_settings["control"], error)) from None
    raise OSError(errno.ENOENT, reason)


def _resolved(name):
    """The export to ask simsrd for when a client wants ``name``. Raises OSError if it is not in the SR of sr=."""
    if not _settings["sr"]:
        return name
    disks = _disks_of_sr()
    found = [uuid for uuid, label in disks if name in (uuid, label)] if name else [uuid for uuid, _ in disks]
    if len(found) != 1:
        raise OSError(errno.ENOENT, "SR %s has %d disks called %r" % (_settings["sr"], len(found), name))
    return found[0]


def _connect(name):
    handle = nbd.NBD()
    handle.add_meta_context(ALLOCATION)
    handle.set_full_info(True)
    handle.set_export_name(name)
    handle.connect_unix(_settings["socket"])
    return handle


def _listing_handle():
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_unix(_settings["socket"])
    return handle


def _close(handle):
    try:
        if handle.aio_is_negotiating():
            handle.opt_abort()
        else:
            handle.shutdown()
    except nbd.Error:
        pass  # it is gone already


class _Export:
    """What one client of nbdkit has open: connections to one disk, each used by one thread at a time."""

    def __init__(self, name):
        self.first = _connect(name)
        self._all = [self.first]
        try:
            self.size_bytes = self.first.get_size()
            for _ in range(int(_settings["connections"]) - 1 if self.first.can_multi_conn() else 0):
                self._all.append(_connect(name))
        except nbd.Error:
            self.close()
            raise
        self._idle = queue.SimpleQueue()  # in C, unlike semaphores and queues with a limit
        for handle in self._all:
            self._idle.put(handle)

    def do(self, request, *arguments):
        """What ``request``, a method of libnbd's handle, returns on a connection that nobody else uses meanwhile."""
        handle = self._idle.get()
        try:
            return request(handle, *arguments)
        finally:
            self._idle.put(handle)

    def close(self):
        for handle in self._all:
            _close(handle)


def _told(function):
    """Tell nbdkit the errno of a failed request; without that every failure would be EIO."""

    @functools.wraps(function)
    def telling(*arguments):
        try:
            return function(*arguments)
        except nbd.Error as error:
            nbdkit.set_error(error.errnum or errno.EIO)
            raise OSError(error.errnum or errno.EIO, error.string) from None
        except OSError as error:
            nbdkit.set_error(error.errno or errno.EIO)
            raise

    return telling


# --- What nbdkit asks about exports --------------------------------------------------------------------------------

@_told
def list_exports(readonly, is_tls):
    if _settings["sr"] and not _settings["export"]:
        return _disks_of_sr()
    if _settings["export"]:
        return [_settings["export"]]
    exports = []
    handle = _listing_handle()
    handle.opt_list(lambda name, description: exports.append((name, description)) or 0)
    _close(handle)
    return exports


def default_export(readonly, is_tls):
    return _settings["export"]


@_told
def open(readonly):
    return _Export(_resolved(_settings["export"] or nbdkit.export_name()))


def close(export):
    export.close()


def export_description(export):
    try:
        return export.first.get_export_description()
    except nbd.Error:
        return ""


def get_size(export):
    return export.size_bytes


def block_size(export):
    sizes = [export.first.get_block_size(which) for which in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
    return tuple(sizes) if all(sizes) else (1, 4096, REQUEST_MAX_BYTES)


def is_rotational(export):
    return export.first.is_rotational()


def can_write(export):
    return not export.first.is_read_only()


def can_flush(export):
    return export.first.can_flush()


def can_trim(export):
    return export.first.can_trim()


def can_zero(export):
    return export.first.can_zero()


def can_fast_zero(export):
    return export.first.can_fast_zero()


def can_fua(export):
    return nbdkit.FUA_NATIVE if export.first.can_fua() else nbdkit.FUA_EMULATE


def can_cache(export):
    return nbdkit.CACHE_NATIVE if export.first.can_cache() else nbdkit.CACHE_NONE


def can_extents(export):
    return export.first.can_meta_context(ALLOCATION)


def can_multi_conn(export):
    return export.first.can_multi_conn()


# --- Requests ------------------------------------------------------------------------------------------------------

def _fua(flags):
    return nbd.CMD_FLAG_FUA if flags & nbdkit.FLAG_FUA else 0


@_told
def pread(export, buf, offset, flags):
    for start in range(0, len(buf), REQUEST_MAX_BYTES):
        count = min(REQUEST_MAX_BYTES, len(buf) - start)
        buf[start:start + count] = export.do(nbd.NBD.pread, count, offset + start)


@_told
def pwrite(export, buf, offset, flags):
    for start in range(0, len(buf), REQUEST_MAX_BYTES):
        export.do(nbd.NBD.pwrite, buf[start:start + REQUEST_MAX_BYTES], offset + start, _fua(flags))


@_told
def flush(export, flags):
    export.do(nbd.NBD.flush)


@_told
def trim(export, count, offset, flags):
    export.do(nbd.NBD.trim, count, offset, _fua(flags))


@_told
def zero(export, count, offset, flags):
    wanted = _fua(flags)
    if not flags & nbdkit.FLAG_MAY_TRIM:
        wanted |= nbd.CMD_FLAG_NO_HOLE
    if flags & nbdkit.FLAG_FAST_ZERO:
        wanted |= nbd.CMD_FLAG_FAST_ZERO
    export.do(nbd.NBD.zero, count, offset, wanted)


@_told
def cache(export, count, offset, flags):
    export.do(nbd.NBD.cache, count, offset)


@_told
def extents(export, count, offset, flags):
    found = []

    def note(context, start, entries, error):
        if context == ALLOCATION:
            for length, kind in zip(entries[::2], entries[1::2]):
                found.append((start, length, kind))
                start += length
        return 0

    export.do(nbd.NBD.block_status, count, offset, note, nbd.CMD_FLAG_REQ_ONE if flags & nbdkit.FLAG_REQ_ONE else 0)
    return found
