"""What the stand-ins for simsrd and for xapi share: a server on a unix socket in a thread, prepared failures.

Both keep their state in plain dicts, record what they were asked, and can be told to fail, to answer nonsense or not
to answer at all.
"""

import http.server
import socketserver
import threading
from contextlib import contextmanager


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64


class Handler(http.server.BaseHTTPRequestHandler):
    """Hands every request to ``model.handle`` and writes what that returns: (status, bytes), or None for no answer."""

    protocol_version = "HTTP/1.1"
    model = None

    def do_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.model.handle(self.command, self.path, self.headers, body)
        if answer is None:
            self.close_connection = True
            return
        status, data = answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = do_DELETE = do_any

    def log_message(self, *_):
        pass


@contextmanager
def serving(model, path):
    """Serve `model` on the unix socket `path`."""
    handler = type("ModelHandler", (Handler,), {"model": model})
    with UnixServer(str(path), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield model
        finally:
            model.released.set()
            server.shutdown()
            thread.join()


class Refused(Exception):
    """What a fake answers instead of a result; None stands for no answer."""


class Model:
    """What both fakes share: a record of requests, prepared failures, a way not to answer."""

    def __init__(self):
        self.lock = threading.Lock()
        self.failures = {}
        self.before = {}
        self.steps = 0
        self.fails_from = None
        self.fails_how = ""
        self.hung = threading.Event()
        self.released = threading.Event()

    def hang(self):
        """A prepared action: keep the client waiting until the test is over."""
        self.hung.set()
        self.released.wait()
        raise Refused(None)

    def fail_from(self, step, how):
        """From request number `step` on do nothing and answer nothing: `how` is "gone", or "done" to do this one first."""
        self.steps, self.fails_from, self.fails_how = 0, step, how

    def work(self):
        """Answer all requests again."""
        self.fails_from = None

    def stopped(self):
        """Count a request. Returns None, or what keeps it from being answered: "gone", "done"."""
        self.steps += 1
        if self.fails_from is None or self.steps <= self.fails_from:
            return None
        return self.fails_how if self.steps == self.fails_from + 1 else "gone"

    def interfere(self, key):
        """Do what the test has prepared for requests called `key`."""
        action = self.before.pop(key, None)
        if action:
            action()
        if key in self.failures:
            raise Refused(self.failures[key])
