"""``simsr run``: the command sees its disk, its status and signals pass through, and nothing stays behind.

With the real daemon; a stand-in takes its place where it has to misbehave.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from cli_kit import processes, wait_until

from simsr.cli import captive, child_daemon, transfer

SHOW_ENVIRONMENT = 'echo "$uri"; echo "$vdi"; echo "$SIMSR_SOCKET"'


@pytest.fixture
def temporary(short_directory, monkeypatch) -> Path:
    """The directory for temporary files; it must be empty again after every run."""
    monkeypatch.setenv("TMPDIR", str(short_directory))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield short_directory
    assert list(short_directory.glob("simsr-run-*")) == []


def daemons_on(directory: Path) -> list[int]:
    """Return the daemons whose root is below ``directory``."""
    return processes("simsr.daemon.main", str(directory))


def test_the_command_finds_its_disk_and_nothing_stays(simsr, temporary):
    done = simsr("run", "--size", "16MiB", "--", "sh", "-c", SHOW_ENVIRONMENT + '; qemu-img info --output=json "$uri"')
    assert (done.status, done.err) == (0, "")
    uri, vdi, socket, *rest = done.lines
    assert uri == f"nbd+unix:///{vdi}?socket={Path(socket).parent}/nbd.sock"
    assert json.loads("".join(rest))["virtual-size"] == 16 * 2**20
    assert not daemons_on(temporary)


def test_the_uri_is_put_into_the_arguments(simsr, temporary):
    done = simsr("run", "--size", "1M", "--", "nbdinfo", "--size", "{uri}")
    assert (done.status, done.lines) == (0, ["1048576"])


def test_the_command_can_use_simsr_itself(simsr, temporary):
    inner = f"{sys.executable} -m simsr.cli.main snapshot $vdi && {sys.executable} -m simsr.cli.main vdi list"
    done = simsr("run", "--size", "1M", "--", "sh", "-c", inner)
    assert done.status == 0
    assert len(done.lines) == 4


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -KILL $$", 137), ("kill -TERM $$", 143)])
def test_the_status_of_the_command_is_ours(simsr, temporary, script, status):
    assert simsr("run", "--size", "1M", "--", "sh", "-c", script).status == status


def test_a_command_that_is_not_there(simsr, temporary):
    done = simsr("run", "--size", "1M", "--", "nosuchcommand")
    assert (done.status, done.err) == (127, "simsr: cannot run nosuchcommand: No such file or directory\n")
    done = simsr("run", "--size", "1MiB", "--", "")
    assert (done.status, done.err) == (127, "simsr: cannot run '': its name is empty\n")
    assert simsr("run", "--size", "1M", "--", "/etc/passwd").status == 126


def test_options_of_the_command_are_its_own(simsr, temporary):
    assert simsr("run", "--size", "1M", "echo", "--size", "--", "-x").lines == ["--size -- -x"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on(start_simsr, temporary, number):
    script = f"trap 'echo got it; exit 9' {number.name[3:]}; echo ready; while :; do sleep 0.05; done"
    child = start_simsr("run", "--size", "1M", "--", "sh", "-c", script)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out, err) == (9, "got it\n", "")
    assert not daemons_on(temporary)


def test_ctrl_c_reaches_the_command_once(temporary, start_simsr):
    """At a terminal the kernel sends SIGINT to the whole group; the daemon lives on until the command is done."""
    ours, theirs = os.openpty()
    script = "trap 'echo got; qemu-img info $uri >/dev/null && echo alive' INT; echo ready; sleep 2; sleep 0.3; exit 3"
    child = start_simsr(
        "run", "--size", "1M", "--", "sh", "-c", script,
        stdin=theirs, start_new_session=True, preexec_fn=lambda: _take_terminal(theirs),
    )  # fmt: skip
    os.close(theirs)
    assert child.stdout.readline() == "ready\n"
    os.write(ours, b"\x03")
    out, err = child.communicate(timeout=120)
    os.close(ours)
    assert (child.returncode, out, err) == (3, "got\nalive\n", "")


def _take_terminal(descriptor: int) -> None:
    """Make the terminal the controlling one of this new session (runs in the child)."""
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


def test_ctrl_c_while_it_starts_leaves_nothing(start_simsr, temporary):
    child = start_simsr("run", "--size", "1M", "--", "sleep", "60")
    wait_until(lambda: daemons_on(temporary))
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out, err) == (130, "", "")
    assert not daemons_on(temporary)


def test_ctrl_c_while_the_daemon_is_born_leaves_nothing(simsr, temporary, monkeypatch):
    popen = subprocess.Popen

    def interrupted(*arguments, **options):
        child = popen(*arguments, **options)
        signal.raise_signal(signal.SIGINT)
        return child

    monkeypatch.setattr(child_daemon.subprocess, "Popen", interrupted)
    with monkeypatch.context() as patched:
        patched.setattr("tempfile.tempdir", str(temporary))
        done = simsr("run", "--size", "1M", "--", "true")
    assert (done.status, done.err) == (130, "")
    assert not daemons_on(temporary)


def test_the_daemon_goes_when_simsr_is_killed(start_simsr, short_directory):
    root = short_directory / "root"
    child = start_simsr("run", "--size", "1M", "--root", str(root), "--", "sh", "-c", "echo $$; exec sleep 60")
    command = int(child.stdout.readline())
    child.kill()
    child.wait()
    try:
        wait_until(lambda: not daemons_on(short_directory))
    finally:
        os.kill(command, signal.SIGKILL)


def test_a_root_is_kept_and_used_again(simsr, short_directory):
    root, cli = str(short_directory / "root"), f"{sys.executable} -m simsr.cli.main"
    keep = f"{cli} vdi create --size 1M --name kept >/dev/null && {cli} sr list --json"
    first = simsr("run", "--size", "1M", "--root", root, "--", "sh", "-c", keep)
    assert first.status == 0
    [sr] = json.loads(first.out)
    assert sr["name"] == "run"
    again = simsr("run", "--size", "2M", "--root", root, "--", "sh", "-c", f"{cli} vdi list --json")
    names = sorted((vdi["name"][:4], vdi["sr"]) for vdi in json.loads(again.out))
    assert names == [("kept", sr["uuid"]), ("run", sr["uuid"])]
    last = simsr("run", "--size", "1M", "--root", root, "--", "sh", "-c", f"{cli} vdi list --json")
    assert len(json.loads(last.out)) == 2


LEAVES_A_CLIENT_BEHIND = """
import os, subprocess, sys
client = "import nbd, os, time; h = nbd.NBD(); h.connect_uri(os.environ['uri']); print('here', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", client], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, os.environ["vdi"])
"""


def test_a_disk_that_somebody_still_uses_is_named(simsr, short_directory, monkeypatch):
    monkeypatch.setattr(transfer, "DETACH_TIMEOUT_S", 0.2)
    done = simsr("run", "--size", "1M", "--root", str(short_directory / "root"), "--", sys.executable, "-c", LEAVES_A_CLIENT_BEHIND)
    client, vdi = done.out.split()
    os.kill(int(client), signal.SIGKILL)
    assert done.status == 0
    assert done.err.startswith(f"simsr: the disk of this run stays: cannot delete VDI {vdi}: attached by ")


def test_a_root_that_is_in_use(simsr, start_simsr, short_directory):
    root = str(short_directory / "root")
    child = start_simsr("run", "--size", "1M", "--root", root, "--", "sh", "-c", "echo ready; exec sleep 60")
    assert child.stdout.readline() == "ready\n"
    done = simsr("run", "--size", "1M", "--root", root, "--", "true")
    assert done.status == 4
    assert "in use by another process" in done.err
    child.terminate()
    child.wait(120)


def test_a_root_that_cannot_be(simsr, tmp_path):
    (tmp_path / "file").touch()
    done = simsr("run", "--size", "1M", "--root", str(tmp_path / "file" / "x"), "--", "true")
    assert (done.status, done.err) == (1, f"simsr: cannot use {tmp_path}/file/x: Not a directory\n")


def test_a_bad_size_starts_nothing(simsr, temporary, monkeypatch):
    monkeypatch.setattr(child_daemon, "DAEMON", ["/nowhere/simsrd"])
    assert simsr("run", "--size", "x", "--", "true").status == 2


# --- daemons that misbehave ------------------------------------------------------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(child_daemon, "DAEMON", ["bash", "-c", script, "simsrd"])


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'simsrd: store x is damaged: y' >&2; echo 'Hint: z' >&2; exit 31", "store x is damaged: y"),
        ("exit 3", "it ended with status 3"),
        ("echo hello; exec sleep 600", "it said 'hello'"),
        ("exec sleep 600", "it was not ready within 0 s"),
    ],
)
def test_a_daemon_that_does_not_start(simsr, temporary, monkeypatch, script, reason):
    if "ready" in reason:
        monkeypatch.setattr(child_daemon, "START_TIMEOUT_S", 0.4)
    stand_in(monkeypatch, script)
    done = simsr("run", "--size", "1M", "--", "echo", "ran")
    assert (done.status, done.out) == (4, "")
    assert done.err.splitlines()[0].endswith(f": {reason}")
    assert done.err.startswith(f"simsr: simsrd did not start on {temporary}/simsr-run-")


def test_a_daemon_that_does_not_stop_is_killed(simsr, temporary, monkeypatch, daemon):
    monkeypatch.setattr(child_daemon, "STOP_TIMEOUT_S", 0.3)
    stand_in(monkeypatch, f"trap '' TERM; echo 'simsrd: ready, control socket {daemon.socket}'; while :; do sleep 0.1; done")
    done = simsr("run", "--size", "1M", "--", "echo", "ran")
    assert (done.status, done.out) == (0, "ran\n")
    assert done.err == "simsr: simsrd did not stop within 0 s and was killed\n"


def test_a_disk_that_cannot_be_made_stops_everything(simsr, temporary, monkeypatch):
    stand_in(monkeypatch, "echo 'simsrd: ready, control socket /nowhere'; exec sleep 60")
    done = simsr("run", "--size", "1M", "--", "echo", "ran")
    assert (done.status, done.out) == (4, "")
    assert "simsrd cannot be reached at /nowhere" in done.err


def test_the_end_of_the_command_is_seen_though_another_thread_takes_its_signal(monkeypatch):
    """It ends between the look at it and the wait for SIGCHLD; a thread that does not block the signal gets it, and it is lost."""
    looked, look = [], os.waitpid

    def waitpid(child, options):
        looked.append(child)
        if len(looked) > 1:
            return look(child, options)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        wait_until(lambda: signal.SIGCHLD not in signal.sigpending())
        return 0, 0

    monkeypatch.setattr(captive.os, "waitpid", waitpid)
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    try:
        assert captive._run(["sh", "-c", "exit 7"], dict(os.environ)) == 7
    finally:
        over.set()
        other.join()
