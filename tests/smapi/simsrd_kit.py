"""A real simsrd for the tests of the plug-in."""

import re
import signal
import subprocess
import sys


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
            self.process.wait(timeout=60)
            self.process.stdout.close()
