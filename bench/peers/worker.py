"""A worker as the driver sees it: a process group that runs only while it is asked."""

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from typing import Any

from peer import PeerError

MAX_REPLY = 1 << 20  # bytes of a line; a reply of 128 tokens takes about 1,000
STDERR_LINES = 15


class Worker:
    """Starts `command`; `await_ready` reads its first line into `about`, and stops it until `ask`. Each waits `timeout_s` at most.

    Raises `PeerError` with the name and the last lines of stderr when the process ends, is late, or talks nonsense."""

    def __init__(self, name: str, command: list[str], timeout_s: float, environment: dict[str, str] | None = None):
        self.name, self.timeout_s = name, timeout_s
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close(); a pipe that nobody reads would fill
        # A process group in our session: stopped members are hung up by the kernel should the driver be killed.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, env=environment, process_group=0
        )  # fmt: skip

    def await_ready(self) -> None:
        self.about = self.read()
        self.signal(signal.SIGSTOP)

    def ask(self, ids: list[int], n: int) -> dict:
        """One reply, with `total_s`: seconds from the request to the reply as the driver's clock has them."""
        self.signal(signal.SIGCONT)
        begin = time.perf_counter()
        try:
            self.process.stdin.write(json.dumps({"ids": ids, "n": n}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.failed("ended") from None
        reply = self.read()
        reply["total_s"] = time.perf_counter() - begin
        self.signal(signal.SIGSTOP)  # threads that wait by spinning must not slow down the next one
        if not reply.get("tokens"):
            raise self.failed("answered without tokens")
        return reply

    def read(self) -> dict[str, Any]:
        ready, _, _ = select.select([self.process.stdout], [], [], self.timeout_s)
        if not ready:
            raise self.failed(f"did not answer within {self.timeout_s:g} s")
        line = self.process.stdout.readline(MAX_REPLY)
        if not line:
            raise self.failed("ended")
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError):
            raise self.failed(f"answered what is no JSON object: {line[:80]!r}") from None

    def failed(self, what: str) -> PeerError:
        if what == "ended":
            with contextlib.suppress(subprocess.TimeoutExpired):
                what = f"ended with status {self.process.wait(5)}"
        self.stderr.seek(0)
        tail = self.stderr.read().decode(errors="replace").splitlines()[-STDERR_LINES:]
        return PeerError(f"peer {self.name} {what}", "the end of its stderr:\n" + "\n".join(f"    {line}" for line in tail or ["(empty)"]))

    def signal(self, number: int) -> None:
        """To the whole group: what a dead worker had started may still be there."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def close(self) -> None:
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.stderr):
            with contextlib.suppress(BrokenPipeError):  # a request that it never read
                stream.close()
