"""Compiles stack.cpp for this machine once, and loads it.

The library lies in the user's cache under a name that holds everything it was made from: source,
compiler and its version, flags, processor. A file that is damaged is built again, not trusted; one that no process
has loaded for a month is deleted when another is built."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dspark.errors import RuntimeUnavailable
from dspark.target.demo import cache_directory

SOURCE = Path(__file__).with_name("stack.cpp")
# OpenMP is the one torch has loaded, by its common name: a second pool of threads would be in the first one's way.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
NUM_KEPT, DAYS_KEPT = 3, 30  # builds kept whatever their age, and the age of the others' last use
COMPILERS = ("c++", "g++", "clang++")


@functools.cache
def compiled(say: Callable[[str], None] = lambda text: None) -> ctypes.CDLL:
    """The compiled library. Raises `RuntimeUnavailable` where none can be made."""
    path = built(say)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeUnavailable(f"{path} does not load: {error}") from error


def built(say: Callable[[str], None], directory: Path | None = None) -> Path:
    """Path of the library, compiled now unless a whole one is there."""
    compiler = find_compiler()
    directory = directory or cache_directory() / "native"
    try:
        path = directory / f"stack-{fingerprint(compiler)[:16]}.so"
        label = path.with_suffix(".sha256")
        if label.exists() and path.exists() and label.read_bytes() == hashlib.sha256(path.read_bytes()).hexdigest().encode():
            with contextlib.suppress(OSError):  # a cache that we may only read
                path.touch()  # its age is that of its last use
            return path
        say("compiling the native runtime for this machine (once, about ten seconds)")
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            made = Path(scratch) / path.name
            done = subprocess.run(
                [compiler, *FLAGS, "-o", str(made), str(SOURCE)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=300,
                check=False,
            )
            if done.returncode:
                raise RuntimeUnavailable(f"{compiler} cannot compile {SOURCE.name}: {last_line(done.stderr)}")
            digest = hashlib.sha256(made.read_bytes()).hexdigest()
            os.replace(made, path)
            (Path(scratch) / label.name).write_text(digest)
            os.replace(Path(scratch) / label.name, label)
        delete_unused(directory)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeUnavailable(f"cannot build the native runtime in {directory} with {compiler}: {error}") from error
    return path


def delete_unused(directory: Path) -> None:
    """Deletes old builds. A process that has one loaded keeps it; what cannot be deleted stays."""
    with contextlib.suppress(OSError):
        last_use = {path: path.stat().st_mtime for path in directory.glob(f"{SOURCE.stem}-*.so")}
        for path in sorted(last_use, key=lambda path: last_use[path])[:-NUM_KEPT]:
            if time.time() - last_use[path] > DAYS_KEPT * 86400:
                path.with_suffix(".sha256").unlink(missing_ok=True)
                path.unlink()


def find_compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise RuntimeUnavailable(f"no C++ compiler found (looked for {', '.join(names)})")
    return found


def fingerprint(compiler: str) -> str:
    command = [compiler, "--version"]
    version = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False).stdout
    return hashlib.sha256(
        "\n".join([SOURCE.read_text(), compiler, version, *FLAGS, platform.machine(), processor_flags()]).encode()
    ).hexdigest()


def processor_flags() -> str:
    """The instruction sets that `-march=native` chose from; a cache on a shared disk may meet another machine."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()


def last_line(text: str) -> str:
    errors = [line for line in text.splitlines() if "error" in line]
    return (errors or text.strip().splitlines() or ["no message"])[0]
