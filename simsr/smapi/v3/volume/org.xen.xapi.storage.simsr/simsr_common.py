"""simsr_common: what all methods of simsr's SMAPIv3 plug-in share, from the process to the requests to simsrd.

Theory. Nothing is kept between two calls: the string that SR.attach answers says which socket and which SR, a volume's
URI says which volume as well. A volume's key is its VDI's uuid, so it does not matter that xapi calls Volume.revert with
a uuid where other methods have the key. What xapi stores with Volume.set is kept in the VDI's sm_config under a prefix.

Invariants
  * Standard output is one JSON document: the result with exit status 0, else the error object with exit status 1.
  * UNIMPLEMENTED_IN_SM_BACKEND means "nothing was touched" and only that: VM.revert answers it by cloning.
  * simsrd is asked by full uuid only, never by name or prefix.
  * Python 3.6 syntax and standard library only; imports are made where they are needed, start-up time is paid per call.
"""

import json
import os
import re
import sys
import time

VERSION = "0.1"
TYPE = "simsr"  # SM.type: the last component of the volume directory's name
SCHEME = "nbd+simsr"  # of volumes' URIs: the name of the datapath directory
DEFAULT_SOCKET = "/run/simsr/control.sock"
DEADLINE_S = 600  # for one answer of simsrd
SOCKET_PATH_MAX_BYTES = 107  # sun_path of Linux, without the terminating NUL
REQUEST_MAX_BYTES = 1 << 20
KEY_PREFIX = "smapiv3."  # of what Volume.set stores, in the VDI's sm_config
CLONE_ON_BOOT = "clone-on-boot"
NOT_INHERITED = frozenset(["is_a_snapshot", "snapshot_of", "snapshot_time", "content_id", CLONE_ON_BOOT])
CLIENT_PREFIX = "smapiv3:"  # of the names under which simsrd notes our attachments

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
METHODS = {}  # name -> (function, parameters as {name: check})


class Failure(Exception):
    """A failure to be answered: `number` as sm numbers its faults, `text` says which object, why, and what to do."""

    def __init__(self, number, text):
        Exception.__init__(self, number, text)
        self.number = number
        self.text = text

    def __str__(self):
        return self.text

    def answer(self):
        """(code, params) of the error object, which become the XenAPI error."""
        if self.number == 38:
            return "UNIMPLEMENTED_IN_SM_BACKEND", [self.text]
        return "SR_BACKEND_FAILURE_%d" % self.number, ["", self.text, ""]


# --- Parameters ----------------------------------------------------------------------------------------------------

def method(called, **parameters):
    """Make a function the method `called`; its parameters, besides dbg, are checked before it is called."""
    def note(function):
        METHODS[called] = (function, parameters)
        return function
    return note


def string(value, what):
    if not isinstance(value, str):
        raise Failure(143, "%s is not a string" % what)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Failure(143, "%s is not valid Unicode" % what)
    return value


def integer(value, what):
    if type(value) is not int:
        raise Failure(143, "%s is not an integer" % what)
    return value


def boolean(value, what):
    if type(value) is not bool:
        raise Failure(143, "%s is neither true nor false" % what)
    return value


def mapping(value, what):
    if not isinstance(value, dict):
        raise Failure(143, "%s is not an object of strings" % what)
    for key, item in value.items():
        string(key, "a key of " + what)
        string(item, "%s of %s" % (key, what))
    return value


def uuid_text(value, what):
    lowered = string(value, what).lower()
    if not UUID.match(lowered):
        raise Failure(1, "%s %r is not a uuid" % (what, value[:80]))
    return lowered


def size_bytes(value, what):
    if integer(value, what) <= 0:
        raise Failure(79, "%s is %d; a volume has at least 1 byte" % (what, value))
    return value


def socket_path(value, what):
    if not value.startswith("/") or "\0" in value or len(value.encode("utf-8")) > SOCKET_PATH_MAX_BYTES:
        raise Failure(91, "%s is %r; it must be the absolute path of simsrd's control socket, at most %d bytes long"
                      % (what, value[:200], SOCKET_PATH_MAX_BYTES))
    return value


def configuration_socket(configuration):
    return socket_path(configuration.get("socket", DEFAULT_SOCKET), "device_config:socket")


def checked(name, request):
    """The parameters of the method `name` in `request`, checked. Unknown ones are ignored, as the interface may grow."""
    if not isinstance(request, dict):
        raise Failure(143, "expected a JSON object with the parameters of %s on standard input" % name)
    values = {}
    for parameter, check in METHODS[name][1].items():
        if parameter not in request:
            raise Failure(143, "%s needs the parameter %s" % (name, parameter))
        values[parameter] = check(request[parameter], "the parameter %s of %s" % (parameter, name))
    return values


# --- simsrd --------------------------------------------------------------------------------------------------------

class Daemon:
    """simsrd's control API. Every failure is a Failure with the number that simsrd gave it."""

    def __init__(self, path):
        self._path = path

    def call(self, verb, target, body=None, missing=144):
        """The JSON answer, None if there is none. `missing` is the number if simsrd knows no such object."""
        data = None if body is None else json.dumps(body).encode("ascii")
        status, answer = self._exchange(verb, target, data)
        try:
            value = json.loads(answer.decode("utf-8")) if answer else None
        except ValueError:
            raise Failure(47, "what answers at %s is not simsrd: %s %s got status %d and no JSON"
                          % (self._path, verb, target, status))
        if 200 <= status < 300:
            return value
        error = value.get("error") if isinstance(value, dict) else None
        if not isinstance(error, dict):
            raise Failure(202, "simsrd answered %s %s with status %d" % (verb, target, status))
        number = error.get("sm_fault")
        if error.get("code") in ("NotFound", "Ambiguous"):
            number = missing
        elif type(number) is not int or number <= 0:
            number = 202
        raise Failure(number, ". ".join(str(part) for part in (error.get("message"), error.get("hint")) if part))

    def _exchange(self, verb, target, data):
        """(status, body) of one request. HTTP/1.0 by hand, which is a few lines when the other end closes the connection:
        importing http.client would take as long as everything else in a call."""
        import socket
        import struct
        what = "%s %s" % (verb, target)
        head = [what + " HTTP/1.0", "Host: localhost", "Accept: application/json", "User-Agent: simsr-v3/" + VERSION]
        if data is not None:
            head += ["Content-Type: application/json", "Content-Length: %d" % len(data)]
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            try:
                # The kernel's time-outs, because with a full backlog Python's make connect() fail at once.
                for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", DEADLINE_S, 0))
                sock.connect(self._path.encode("utf-8"))
            except OSError as error:
                raise Failure(47, "simsrd cannot be reached at %s: %s. Start it, or correct device_config:socket"
                              % (self._path, error.strerror or error))
            try:
                sock.sendall("\r\n".join(head + ["", ""]).encode("ascii") + (data or b""))
                answer = b"".join(iter(lambda: sock.recv(1 << 20), b""))
            except BlockingIOError:
                raise Failure(47, "simsrd at %s has not answered within %d s; whether it has done %s is unknown"
                              % (self._path, DEADLINE_S, what))
            except OSError as error:
                raise Failure(47, "simsrd at %s broke off; whether it has done %s is unknown: %s"
                              % (self._path, what, error.strerror or error))
        head, _, body = answer.partition(b"\r\n\r\n")
        status = re.match(br"HTTP/1\.[01] ([0-9]{3})\b", head)
        length = re.search(br"(?i)\r\ncontent-length: *([0-9]+)", head)
        if not status or length and int(length.group(1)) != len(body):
            raise Failure(47, "simsrd at %s broke off; whether it has done %s is unknown: it answered %d bytes, %r..."
                          % (self._path, what, len(answer), answer[:40]))
        return int(status.group(1)), body


class Repository:
    """An SR, as every call after SR.attach names it: simsr:///UUID, with ?socket=PATH if that is not the default."""

    def __init__(self, sr_uuid, path):
        self.uuid = sr_uuid
        self.path = path
        self.daemon = Daemon(path)

    def url(self, scheme, *parts):
        import urllib.parse
        query = "" if self.path == DEFAULT_SOCKET else "?socket=" + urllib.parse.quote(self.path, "/")
        return "%s:///%s%s" % (scheme, "/".join((self.uuid,) + parts), query)

    def __str__(self):
        return self.url(TYPE)

    def show(self):
        """The SR as simsrd has it."""
        for sr in self.daemon.call("GET", "/v1/srs"):
            if sr["uuid"] == self.uuid:
                return sr
        for path, reason in self.daemon.call("GET", "/v1/daemon").get("failed_srs", {}).items():
            if os.path.basename(path) == self.uuid:
                raise Failure(47, "simsrd could not open SR %s: %s" % (self.uuid, reason))
        raise Failure(47, "simsrd at %s has no SR %s" % (self.path, self.uuid))

    def vdis(self):
        return self.daemon.call("GET", "/v1/vdis?sr=" + self.show()["uuid"], missing=47)

    def vdi(self, key):
        """The VDI of the volume `key`, which must be in this SR."""
        lowered = key.lower()
        if not UUID.match(lowered):
            raise Failure(144, "SR %s has no volume %r; keys of volumes are uuids" % (self.uuid, key[:80]))
        try:
            vdi = self.daemon.call("GET", "/v1/vdis/" + lowered)
        except Failure as failure:
            if failure.number == 144:
                self.show()  # if the SR is not there, that is the failure to report
            raise
        if vdi["uuid"] != lowered:
            raise Failure(144, "simsrd has no volume %s" % lowered)  # it also finds by name, which may look like a uuid
        if vdi["sr"] != self.uuid:
            raise Failure(144, "volume %s is in SR %s, not in %s" % (lowered, vdi["sr"], self.uuid))
        return vdi

    def find(self, key):
        """As `vdi`, but None if there is no such volume."""
        try:
            return self.vdi(key)
        except Failure as failure:
            if failure.number != 144:
                raise
            return None

    def act(self, key, operation, body=None):
        """POST to the VDI of the volume `key`, once it has been found in this SR."""
        return self.daemon.call("POST", "/v1/vdis/%s/%s" % (self.vdi(key)["uuid"], operation), body)

    def patch(self, key, **changes):
        self.daemon.call("PATCH", "/v1/vdis/" + self.vdi(key)["uuid"], changes)

    def name_for(self, name, attempt):
        """Call `attempt` with the SR's name, or one with its uuid added if simsrd has another SR of that name."""
        try:
            return attempt(name or "sr-" + self.uuid)
        except Failure as failure:
            if failure.number != 42 or not name:
                raise
            return attempt("%s (%s)" % (name, self.uuid[:8]))

    def stat(self):
        sr = self.show()
        return {
            "sr": str(self),
            "name": sr["name"],
            "uuid": sr["uuid"],
            "description": sr["description"],
            "free_space": max(0, sr["physical_size_bytes"] - sr["physical_utilisation_bytes"]),
            "total_space": sr["physical_size_bytes"],
            "datasources": [],
            "clustered": False,
            "health": ["Healthy", ""],
        }

    def volume(self, vdi):
        """The volume record of a VDI as simsrd describes it."""
        return {
            "key": vdi["uuid"],
            "uuid": vdi["uuid"],
            "name": vdi["name"],
            "description": vdi["description"],
            "read_write": not vdi["read_only"],
            "sharable": vdi["sharable"],
            "virtual_size": vdi["size_bytes"],
            "physical_utilisation": vdi["physical_utilisation_bytes"],
            "uri": [self.url(SCHEME, vdi["uuid"])],
            "keys": shown_keys(vdi),
            "volume_type": "CBT_Metadata" if vdi["type"] == "cbt_metadata" else "Data",
            "cbt_enabled": vdi.get("cbt_enabled", False),
        }


def locate(value, what, scheme, parts):
    """What the URL `value` names: (Repository, the rest of its path). It has `parts` uuids in its path."""
    import urllib.parse
    try:
        url = urllib.parse.urlsplit(string(value, what))
        uuids = url.path[1:].lower().split("/")
        query = urllib.parse.parse_qs(url.query, keep_blank_values=True, strict_parsing=True) if url.query else {}
    except ValueError:
        url = None
    if url is None or url.scheme != scheme or url.netloc or len(uuids) != parts or not all(map(UUID.match, uuids)):
        raise Failure(1, "%s %r is not of the form %s:///%s?socket=PATH"
                      % (what, value[:200], scheme, "/".join(["UUID"] * parts)))
    return Repository(uuids[0], socket_path(query.get("socket", [DEFAULT_SOCKET])[-1], "the socket of " + what)), uuids[1:]


def repository(value, what):
    return locate(value, what, TYPE, 1)[0]


class Disk:
    """A volume as the datapath methods name it: nbd+simsr:///SR/VOLUME."""

    def __init__(self, value, what):
        self.repository, (self.key,) = locate(value, what, SCHEME, 2)

    def attach(self, domain, writable):
        self.repository.act(self.key, "attach", {"client": CLIENT_PREFIX + domain, "writable": writable})

    def detach(self, domain):
        """End what `attach` began; a disk that is gone, or a simsrd that has been restarted, has nothing to end."""
        vdi = self.repository.find(self.key)
        if vdi:
            self.repository.daemon.call("POST", "/v1/vdis/%s/detach" % vdi["uuid"], {"client": CLIENT_PREFIX + domain})


def domain_name(value, what):
    if not 0 < len(string(value, what)) <= 200:
        raise Failure(143, "%s is %r; it must have 1 to 200 characters" % (what, value[:80]))
    return value


# --- What xapi stores with a volume --------------------------------------------------------------------------------

def stored_keys(vdi):
    """What Volume.set has stored with the volume."""
    return {key[len(KEY_PREFIX):]: value for key, value in vdi["sm_config"].items() if key.startswith(KEY_PREFIX)}


def shown_keys(vdi):
    """What xapi reads of a volume. What it has not stored itself is told from what simsrd knows: other programs take
    snapshots as well."""
    keys = {"vdi-type": vdi["type"]}
    if vdi["is_a_snapshot"]:
        match = re.match(r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9:]{8})", vdi["snapshot_time"] or "")
        keys.update(is_a_snapshot="true", snapshot_of=vdi["snapshot_of"],
                    snapshot_time="%s%s%sT%sZ" % match.groups() if match else "19700101T00:00:00Z")
    keys.update(stored_keys(vdi))
    if vdi["type"] == "cbt_metadata":
        keys["vdi-type"] = vdi["type"]
    return keys


def inherited(vdi):
    """The sm_config of a snapshot or clone: without what says that the source is a snapshot, or is booted from."""
    return {key: value for key, value in vdi["sm_config"].items()
            if not (key.startswith(KEY_PREFIX) and key[len(KEY_PREFIX):] in NOT_INHERITED)}


# --- The process ---------------------------------------------------------------------------------------------------

def log(line):
    """Write to SMlog. A machine without syslog loses the line, never the call."""
    try:
        import syslog
        syslog.openlog("SM", 0, syslog.LOG_LOCAL2)
        syslog.syslog(syslog.LOG_INFO, "[%d] simsr-v3 %s" % (os.getpid(), ascii(line)[1:-1]))
    except (ImportError, OSError, ValueError):
        pass


def error_object(failure):
    """The error document of section "errors" of the interface, for any exception."""
    import traceback
    code, params = failure.answer() if isinstance(failure, Failure) else (
        "SR_BACKEND_FAILURE_1200", ["", "a mistake in the plug-in: %s: %s" % (type(failure).__name__, failure), ""])
    frames = traceback.extract_tb(failure.__traceback__)
    return {"code": code, "params": params, "backtrace": {
        "error": "%s: %s" % (type(failure).__name__, params[-1] or " ".join(params).strip()),
        "files": [frame[0] for frame in frames], "lines": [frame[1] for frame in frames]}}


def perform(name, arguments):
    """Carry out one method with the parameters that are on standard input."""
    if arguments not in ([], ["--json"]):
        raise Failure(143, "%s takes --json and its parameters on standard input" % name)
    raw = sys.stdin.buffer.read(REQUEST_MAX_BYTES + 1)
    if len(raw) > REQUEST_MAX_BYTES:
        raise Failure(143, "the parameters of %s are longer than %d bytes" % (name, REQUEST_MAX_BYTES))
    try:
        request = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Failure(143, "standard input is not JSON: %s" % error)
    if name not in METHODS:
        raise Failure(38, "method %s" % name)
    values = checked(name, request)
    log("%s %s" % (name, " ".join("%s=%s" % (key, value) for key, value in sorted(request.items())
                                  if isinstance(value, (str, int)))[:2000]))  # device_config may hold secrets
    return METHODS[name][0](**values)


def take_stdout():
    """A descriptor of the real standard output; what anybody else prints goes to standard error from now on."""
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answer_fd


def main(script, arguments):
    """Run the method that the path `script` is named after; return the exit status."""
    started_s = time.time()
    answer_fd = take_stdout()
    directory, name = os.path.split(os.path.abspath(script))
    if name == "Plugin.Query" and os.path.basename(directory) == SCHEME:
        name = "Datapath.Query"  # both trees have a Plugin.Query
    status = 0
    try:
        document = json.dumps(perform(name, arguments))
        outcome = "done"
    except BaseException as failure:
        document, status = json.dumps(error_object(failure)), 1
        outcome = "failed: %s" % failure
    log("%s: %s, %.3f s" % (name, outcome, time.time() - started_s))
    data = document.encode("ascii")
    try:
        while data:
            data = data[os.write(answer_fd, data):]
    except OSError as error:
        log("nobody read the answer: %s" % error)
        status = 1
    return status
