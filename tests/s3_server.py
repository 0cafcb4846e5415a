"""A real S3 server process on loopback for the tests: moto, with a door that can be shut and a log of requests."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

BUCKET = "memlib-tests"


@dataclass(frozen=True)
class S3Server:
    """The server at `endpoint`; it answers 503 while `shut` exists and writes a line a request to `log`."""

    endpoint: str
    shut: Path
    log: Path

    def uri(self, folder):
        return f"s3://{BUCKET}/{folder}"

    def requests(self):
        return [line.split(" ", 1) for line in self.log.read_text().splitlines()]

    @contextlib.contextmanager
    def counted(self):
        """Collects the requests made inside the block."""
        before, made = len(self.requests()), []
        yield made
        made += self.requests()[before:]


@contextlib.contextmanager
def s3_server(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = S3Server(f"http://127.0.0.1:{port}", folder / "shut", folder / "requests.log")
    server.log.touch()
    command = [sys.executable, __file__, str(port), str(server.shut), str(server.log)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield server
    finally:
        process.kill()
        process.wait()


def credentials(server):
    """What a user sets; nothing here asks the machine it runs on for more."""
    return {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _wait_for(port, seconds=60):
    until = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < until, "the S3 server did not start"
            time.sleep(0.05)


def _serve(port, shut, log):
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    s3 = DomainDispatcherApplication(create_backend_app)

    def application(environ, start_response):
        with open(log, "a") as lines:
            lines.write(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ['QUERY_STRING']}\n")
        if os.path.exists(shut):
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        return s3(environ, start_response)

    run_simple("127.0.0.1", int(port), application, threaded=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
