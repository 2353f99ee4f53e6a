"""The app on a socket, from start to a graceful end."""

import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from dspark.errors import SettingError

LAST_WORDS_SECONDS = 5.0  # for responses that are complete but not sent when the engine has closed


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises `SettingError` for an address that cannot be had."""
    if not 0 <= port < 2**16:
        raise SettingError(f"--port is {port}", "ports are 1 to 65535; 0 takes any free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise refused(host, port, error) from error
    return listener


def refused(host: str, port: int, error: OSError) -> SettingError:
    if error.errno == errno.EADDRINUSE:
        return SettingError(f"port {port} on {host} is in use", "stop the other server, or choose another with `--port`")
    return SettingError(f"cannot listen on {host}, port {port}: {error.strerror}", "choose another with `--host` and `--port`")


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


def serve(app: FastAPI, listener: socket.socket, drain_seconds: float, on_ready: Callable[[str], None], say: Callable[[str], None]) -> None:
    """Answer until SIGINT or SIGTERM; then refuse new requests, and let those running finish within `drain_seconds`. A second
    signal ends at once (KeyboardInterrupt). `on_ready` hears the URL once it answers. To be called from the main thread."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=int(LAST_WORDS_SECONDS))
    server = uvicorn.Server(config)
    (host, port, *_), url = listener.getsockname(), url_of(listener)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            server.run(sockets=[listener])
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="http", daemon=True)
    with signalled() as stop:
        thread.start()
        while thread.is_alive() and not server.started and not stop.wait(0.01):
            pass
        if server.started:
            on_ready(url)
        while thread.is_alive() and not stop.wait(0.2):
            pass
        if stop.is_set():
            say(f"closing: answers that run have {drain_seconds:g} seconds to finish; once more ends them now")
        app.state.close(drain_seconds if stop.is_set() else 0.0)
        server.should_exit = True
        thread.join(2 * LAST_WORDS_SECONDS)
    if failures:
        error = failures[0]
        raise refused(host, port, error) if isinstance(error, OSError) else error


@contextlib.contextmanager
def signalled() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second one raises KeyboardInterrupt."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
