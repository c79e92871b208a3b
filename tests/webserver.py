"""A server as users start it, and a client that sends just the headers it is told."""

import http.client
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Answer:
    status: int
    headers: dict
    text: str


@dataclass
class Server:
    """A running `smoldpo web`; `url` holds the token."""

    process: subprocess.Popen
    url: str
    port: int = field(init=False)
    token: str = field(init=False)

    def __post_init__(self):
        port, self.token = re.fullmatch(
            r"http://127\.0\.0\.1:(\d+)/\?token=(\S+)", self.url
        ).groups()
        self.port = int(port)

    def ask(self, path, method="GET", body=None, cookie=True, **headers):
        """A request by hand; headers with the value None are left out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        sent = {"Host": f"127.0.0.1:{self.port}"}
        if cookie:
            sent["Cookie"] = f"smoldpo-{self.port}={self.token}; smoldpo-voter={b'ann'.hex()}"
        if method == "POST":
            sent["Origin"] = f"http://127.0.0.1:{self.port}"
            sent["Content-Length"] = str(len(body or ""))
        sent |= {name.replace("_", "-").title(): value for name, value in headers.items()}
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders((body or "").encode())
        answer = connection.getresponse()
        found = Answer(answer.status, dict(answer.getheaders()), answer.read().decode())
        connection.close()
        return found


class Servers:
    """Servers as users start them; all end together."""

    def __init__(self):
        self._started = []

    def __call__(self, folder, *arguments):
        """One in this folder."""
        words = [sys.executable, "-m", "smoldpo", "web", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        )
        self._started.append(process)
        return Server(process, process.stdout.readline().strip())

    def end(self):
        for process in self._started:
            process.terminate()
            process.wait(10)
            process.stdout.close()
