"""Which peers there are, and how each one's worker is started."""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from dspark.errors import UserError

HERE = Path(__file__).parent
LLAMA_METHODS = ("none", "ngram-simple", "ngram-mod", "ngram-map-k", "ngram-map-k4v", "ngram-cache", "draft-dspark", "draft-dspark-3")
EXPORTED = "draft-dspark"  # methods that take a head


class PeerError(UserError):
    """A peer that is unknown, not installed, or that failed."""


@dataclass(frozen=True)
class Kind:
    """A program to compare. The first precision is the one of a bare name; so is the first method, of speculation.

    `needs` is what must be installed, below the folder of the peers; `python` runs the worker."""

    worker: str
    precisions: tuple[str, ...]
    methods: tuple[str, ...]
    needs: str = ""
    python: str = sys.executable
    gguf: bool = False


KINDS = {
    "dspark": Kind("run_dspark.py", ("bf16", "f32", "int8"), ("head", "head-alone", "lookup")),
    "dspark-plain": Kind("run_dspark.py", ("bf16", "f32", "int8"), ("none",)),
    "transformers": Kind("run_transformers.py", ("bf16", "f32"), ("none", "lookup")),
    "llama.cpp": Kind(
        "run_llama.py", ("bf16", "f32", "f16", "q8_0", "q4_0", "q4_1"), LLAMA_METHODS, needs="llama.cpp/build/bin/llama-server", gguf=True
    ),
    "openvino": Kind(
        "run_openvino.py", ("f16", "q8_0", "q4_0", "q4_1"), ("none", "lookup"), "openvino/bin/python", "openvino/bin/python", gguf=True
    ),
    "vllm": Kind("run_vllm.py", ("bf16",), ("none", "ngram"), "vllm/bin/python", "vllm/bin/python"),
}


@dataclass(frozen=True)
class Peer:
    """One row of the table: a kind at a precision, speculating by a method. `limit`: prompts of each set, None for all."""

    kind: str
    precision: str
    method: str
    limit: int | None = None

    def __str__(self) -> str:
        plus = "" if self.method == KINDS[self.kind].methods[0] else f"+{self.method}"
        return f"{self.kind}:{self.precision}{plus}"

    def plain(self) -> "Peer | None":
        """The same peer without speculation; None if this is it."""
        kind = {"dspark": "dspark-plain"}.get(self.kind, self.kind)
        other = Peer(kind, self.precision, "none")
        return None if str(other) == str(self) else other


def parse_peer(text: str) -> Peer:
    """KIND[:PRECISION][+METHOD][@LIMIT]. Raises `PeerError` naming what can be chosen."""
    match = re.fullmatch(r"([^:+@]+)(?::([^:+@]+))?(?:\+([^:+@]+))?(?:@([1-9][0-9]*))?", text)
    if match is None:
        raise PeerError(
            f"cannot read peer {text!r}", "write KIND[:PRECISION][+METHOD][@PROMPTS_OF_EACH_SET], as llama.cpp:q8_0+ngram-mod@2"
        )
    name, precision, method, limit = match.groups()
    if name not in KINDS:
        raise PeerError(f"unknown peer {name!r}", f"choose from {', '.join(KINDS)}")
    kind = KINDS[name]
    for value, choices, what in ((precision, kind.precisions, "precision"), (method, kind.methods, "method")):
        if value is not None and value not in choices:
            raise PeerError(f"{name} has no {what} {value!r} here", f"choose from {', '.join(choices)}")
    return Peer(name, precision or kind.precisions[0], method or kind.methods[0], limit and int(limit))


def parse_peers(text: str) -> list[Peer]:
    """A list with commas. Raises `PeerError`, also for a peer named twice."""
    peers = [parse_peer(part.strip()) for part in text.split(",")]
    names = [str(peer) for peer in peers]
    for name in names:
        if names.count(name) > 1:
            raise PeerError(f"peer {name} is named twice", "name each once; a bare name means the first precision and method")
    return peers


def default_home() -> Path:
    """Where `setup.sh` installs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("DSPARK_PEERS", cache / "dspark/peers"))


def command(
    peer: Peer, home: Path, target: Path, threads: int, context: int, eos: int, head: Path | None = None, draft: Path | None = None
) -> list[str]:
    """What starts the worker; `head` is a dspark head, by default the shipped one, and `draft` the same as a GGUF file. Raises `PeerError`
    for a peer that is not installed in `home`, or has no head."""
    kind = KINDS[peer.kind]
    model = home / f"gguf/{peer.precision.upper()}.gguf" if kind.gguf else target
    needed = [(home / kind.needs, peer.kind)] if kind.needs else []
    for file, setup in [*needed, (model, "llama.cpp")]:
        if not file.exists():
            raise PeerError(f"{peer} is not installed: no {file}", f"run bench/peers/setup.sh {setup} {home}")
    settings = dict(
        model=model, precision=peer.precision, method=peer.method, threads=threads, context=context, eos=eos, home=home
    )  # fmt: skip
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    if peer.method.startswith(EXPORTED):
        if head is None or draft is None or not draft.is_file():
            raise PeerError(
                f"{peer} needs a head and the GGUF file made of it", "`dspark convert HEAD FILE --to gguf`, then --head HEAD --draft FILE"
            )
        block = json.loads((head / "config.json").read_text())["block_size"]
        arguments += ["--draft", str(draft.absolute()), "--block", str(block)]
    if head is not None:
        arguments += ["--head", str(head.absolute())]
    return [str(home / kind.python), str(HERE / "workers" / kind.worker), *arguments]
