"""A host's programs, for tests of attached devices: stand-ins for nbd-client, tap-ctl and modprobe.

They take the arguments and print what the real ones do (datapath.md 4.4, 6.4), note each call, and keep their state in files.
nbd-client really connects and leaves a process behind that holds the connection, with the caller's standard output still
open; tap-ctl's tapdisks are processes that connect as tapdisk does. A test prepares failures with `Host.plan`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

COMMON = f"""#!{sys.executable} -SE
import json, os, re, signal, socket, struct, sys, time
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STATE = os.path.join(HERE, "state")
NAME, ARGS = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(os.path.join(STATE, "calls"), "a") as calls:
    calls.write(json.dumps([NAME] + ARGS) + "\\n")

def path(name):
    return os.path.join(STATE, name)

def read(name):
    try:
        with open(path(name)) as file:
            return json.load(file)
    except (FileNotFoundError, ProcessLookupError):
        return None

def write(name, value):
    with open(path(name) + ".new", "w") as file:
        json.dump(value, file)
    os.rename(path(name) + ".new", path(name))

def fail(text, status=1):
    sys.stderr.write(text + "\\n")
    sys.exit(status)

def planned(step):
    plan = read("plan") or {{}}
    wanted = plan.pop(step, None)
    if wanted is not None:
        write("plan", plan)
    return wanted

def connect(address, export):
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    sock.connect(address)
    assert sock.recv(18, socket.MSG_WAITALL)[:16] == b"NBDMAGICIHAVEOPT"
    sock.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, len(export)) + export)
    if len(sock.recv(10, socket.MSG_WAITALL)) != 10:
        fail("Negotiation: the server closed the connection")
    return sock

def stay(keep=None):
    # A process that lives on; what it has inherited stays open, as with a program that is careless about it.
    ready, told = os.pipe()
    pid = os.fork()
    if pid:
        os.read(ready, 1)
        with open(path("pids"), "a") as pids:
            pids.write("%d\\n" % pid)
        return pid
    os.setsid()
    os.write(told, b"x")
    while True:
        time.sleep(60)

def hang():
    write("hanging", os.getpid())
    while True:
        time.sleep(60)

def end(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    for _ in range(12_000):
        try:
            with open("/proc/%d/stat" % pid) as file:
                if file.read().rpartition(") ")[2][0] in "ZX":
                    return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.01)

def alive(pid):
    try:
        with open("/proc/%d/stat" % pid) as file:
            return file.read().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
"""

NBD_CLIENT = COMMON + """
def device_number(text):
    match = re.fullmatch("/dev/nbd([0-9]+)", text)
    if not match or int(match.group(1)) >= 24:
        fail("Error: Cannot open NBD: No such file or directory\\nPlease ensure the 'nbd' module is loaded.\\nExiting.")
    return "nbd" + match.group(1)

if ARGS[0] == "-check":
    connected = read(device_number(ARGS[1]))
    if connected:
        print(connected["pid"])
    sys.exit(0 if connected else 1)
if ARGS[0] == "-d":
    device = device_number(ARGS[1])
    connected = read(device)
    if connected:
        if planned("disconnect"):
            fail("Error: disconnect failed")
        end(connected["pid"])
        os.unlink(path(device))
    sys.exit(0)
where, rest = (ARGS[1], ARGS[2:]) if ARGS[0] == "-unix" else ((ARGS[0], int(ARGS[1])), ARGS[2:])
assert rest[1:5] == ["-timeout", "90", "-persist", "-name"], rest
device, export = device_number(rest[0]), rest[5]
wanted = planned("connect")
if wanted == "hang":
    hang()
if wanted == "taken":  # xapi has taken the device between our look and our try
    write(device, {"pid": os.getppid(), "by": "xapi"})
    with open(os.path.join(HERE, "run/nonpersistent/nbd", device[3:]), "w") as file:
        json.dump({"path": "/x", "exportname": "of xapi"}, file)
    fail("Error: Failed to set up device, device is busy")
if wanted == "fail":
    fail("Error: Socket failed: Connection refused\\nExiting.")
try:
    sock = connect(where, export.encode())
except OSError as error:
    fail("Error: Socket failed: %s\\nExiting." % error.strerror)
write(device, {"pid": stay(sock)})
print("Negotiation: ..size = 1MB\\nConnected %s" % rest[0])
if wanted == "connect and hang":
    hang()
"""

TAP_CTL = COMMON + """
options = dict(zip(ARGS[1::2], ARGS[2::2]))
command = ARGS[0]
if planned(command):
    fail("%s: planned failure" % command, 22)
RUN = os.path.join(HERE, "run", "blktap-control")
taps = read("taps") or {"minors": [], "pids": {}}
for pid in [pid for pid in taps["pids"] if not alive(int(pid))]:
    del taps["pids"][pid]  # whoever was ended by a signal
pid, minor = options.get("-p"), options.get("-m")
if command == "allocate":
    minor = next(number for number in range(99) if number not in taps["minors"])
    taps["minors"].append(minor)
    print("/dev/xen/blktap-2/tapdev%d" % minor)
elif command == "spawn":
    os.makedirs(RUN, exist_ok=True)
    pid = stay()
    taps["pids"][str(pid)] = {}
    print(pid)
elif command == "list":
    used = set()
    for pid, disks in taps["pids"].items():
        if not disks:
            print("pid=%s" % pid)
        for minor, disk in disks.items():
            used.add(int(minor))
            print("pid=%s minor=%s state=0" % (pid, minor) + (" args=" + disk["image"] if disk else ""))
    for minor in set(taps["minors"]) - used:
        print("minor=%d" % minor)
elif command == "free":
    if int(minor) not in taps["minors"]:
        fail("free: no such minor", 19)
    taps["minors"].remove(int(minor))
else:
    disks = taps["pids"].get(pid)
    if disks is None:
        fail("%s: no such process" % command, 3)
    if command == "attach":
        assert int(minor) in taps["minors"]
        disks[minor] = None
    elif minor not in disks:
        fail("%s: no such disk" % command, 19)
    elif command == "open":
        kind, _, where = options["-a"].partition(":")
        try:
            sock = connect(where, b"tapdisk_client\\0") if kind == "nbd" else open(path(os.path.basename(where)))
        except OSError as error:
            fail("open: %s" % error, 5)
        name = os.path.join(RUN, "nbd%s.%s" % (pid, minor))
        open(name, "w").close()
        disks[minor] = {"image": options["-a"], "holder": stay(sock), "read_only": "-R" in ARGS, "socket": name}
    elif command == "close":
        end(disks[minor]["holder"])
        os.unlink(disks[minor]["socket"])
        disks[minor] = None
    elif command == "detach":
        if disks.pop(minor):
            fail("detach: it is open", 16)
        if not disks:
            end(int(pid))
            del taps["pids"][pid]
write("taps", taps)
"""


class Host:
    """The folders of a host: ``bin`` with the programs, ``run`` for run-time files."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("bin", "run", "state"):
            (folder / name).mkdir(parents=True, mode=0o755)
        for name, text in (("nbd-client", NBD_CLIENT), ("tap-ctl", TAP_CTL), ("modprobe", COMMON)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    @property
    def device_config(self):
        return {"run_dir": str(self.folder / "run"), "program_path": f"{self.folder}/nothing:{self.folder}/bin"}

    def plan(self, **steps):
        (self.folder / "state" / "plan").write_text(json.dumps(steps))

    def calls(self, program="", *, looks=False):
        """The calls so far, without those that only look."""
        path = self.folder / "state" / "calls"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in calls if call[0].startswith(program) and (looks or call[1] not in ("-check", "list"))
                and call[0] != "modprobe"]

    def forget_calls(self):
        (self.folder / "state" / "calls").unlink(missing_ok=True)

    def state(self, name):
        path = self.folder / "state" / name
        return json.loads(path.read_text()) if path.exists() else None

    def devices(self):
        """The nbd devices that are connected."""
        return sorted(path.name for path in (self.folder / "state").glob("nbd*"))

    def notes(self):
        """All files of the plug-in and of xapi about devices."""
        return sorted(str(path.relative_to(self.folder / "run")) for path in (self.folder / "run").rglob("*")
                      if (path.is_file() or path.is_symlink()) and path.name != "lock")

    def check_clean(self):
        """Nothing is left: no device, minor, tapdisk, note or process, but for those on which a signal takes a moment to act."""
        assert self.devices() == [] and self.notes() == []
        taps = self.state("taps") or {"minors": [], "pids": {}}
        assert taps["minors"] == []
        pids, give_up = [*map(int, taps["pids"]), *self._pids()], time.monotonic() + 120
        while any(map(is_running, pids)):
            assert time.monotonic() < give_up, [pid for pid in pids if is_running(pid)]
            time.sleep(0.01)

    def _pids(self):
        path = self.folder / "state" / "pids"
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def close(self):
        """End what failed tests have left running."""
        hanging = self.state("hanging")
        for pid in filter(is_running, self._pids() + ([hanging] if hanging else [])):
            os.kill(pid, signal.SIGKILL)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
