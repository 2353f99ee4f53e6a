"""The prefix cache: what the target and the head know of finished texts, for requests that begin alike.

A new request takes the longest common beginning of any entry, or of a request that is running. Natively a key or value has the
same bits whichever pass made it, so an answer after a cached beginning is the cold start's, token for token.

Sliding windows, recurrent states and compressed caches cannot be cut back to an earlier token: an entry that has them is taken whole, by
a text that goes on from its last token, or not at all."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark.drafters import DSparkDrafter, MtpDrafter
from dspark.target.target import State, Target

SHORTEST = 16  # a shorter beginning is computed as fast as copied


@dataclass
class Entry:
    """`ids` are the tokens that the target's state holds; the drafters of the head and of multi-token-prediction modules (None
    without) know as many, some perhaps as features that they have had no use for yet."""

    ids: np.ndarray
    state: State
    head: DSparkDrafter | None
    used: int = 0
    mtp: MtpDrafter | None = None

    def common(self, ids: np.ndarray) -> int:
        return common_prefix(self.ids, ids)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts begin with alike."""
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    return int(differs.argmax()) if differs.any() else size


@dataclass
class PrefixCache:
    """Entries, the least recently used of which go first when memory is needed."""

    target: Target
    entries: list[Entry] = field(default_factory=list)
    clock: itertools.count = field(default_factory=itertools.count)

    def add(self, ids: Sequence[int], state: State, head: DSparkDrafter | None, mtp: MtpDrafter | None = None) -> None:
        """Keep a finished text. Entries that can be had from another one are no longer needed."""
        new = Entry(np.asarray(ids, dtype=np.int64), state, head, next(self.clock), mtp)
        self.entries = [e for e in self.entries if self.held(new, e.ids) < len(e.ids)]
        if all(self.held(e, new.ids) < len(new.ids) for e in self.entries):
            self.entries.append(new)

    def held(self, entry: Entry, ids: np.ndarray) -> int:
        """Of how many of the first tokens of `ids` the target's state can be had from this entry."""
        size = entry.common(ids)
        return size if size == len(entry.ids) or self.target.can_shorten(entry.state) else 0

    def usable(self, entry: Entry, ids: np.ndarray) -> int:
        """How many of the first tokens of `ids` this entry can give. Where it is cut, modules for multi-token prediction have read a
        few tokens further than it goes."""
        size = self.held(entry, ids)
        if size == len(entry.ids) or entry.mtp is None or not entry.mtp.can_fork(size):
            return size
        return max(0, size - entry.mtp.head.num_modules)

    def find(self, ids: Sequence[int], running: Sequence[Entry]) -> tuple[Entry, int] | None:
        """Whoever knows the longest beginning of `ids`, an entry or a running request, and how many tokens that is; None if it is not
        worth it."""
        wanted = np.asarray(ids, dtype=np.int64)
        found = max([*self.entries, *running], key=lambda entry: self.usable(entry, wanted), default=None)
        size = 0 if found is None else self.usable(found, wanted)
        if found is None or size < SHORTEST:
            return None
        found.used = next(self.clock)
        return found, size

    def holds(self, entry: Entry) -> bool:
        return any(mine is entry for mine in self.entries)

    def take(self, found: Entry, size: int) -> tuple[State, DSparkDrafter | None, MtpDrafter | None] | None:
        """State and drafters of the first `size` tokens of what was found, for the caller to go on with; None where they cannot be had.

        An entry that the new text only extends is handed over. Else they are a fork: natively it shares its pages, eagerly it is a copy."""
        if self.holds(found) and size == len(found.ids):
            self.entries = [entry for entry in self.entries if entry is not found]
            return found.state, found.head, found.mtp
        state = self.target.fork(found.state, size)
        if state is None:
            return None
        head = None if found.head is None else found.head.fork(size)
        return state, head, found.mtp.fork(size) if found.mtp is not None and found.mtp.can_fork(size) else None

    def drop_oldest(self) -> bool:
        """Free the entry that was not used for longest; False if there is none."""
        if not self.entries:
            return False
        oldest = min(self.entries, key=lambda entry: entry.used)
        self.entries = [entry for entry in self.entries if entry is not oldest]
        return True
