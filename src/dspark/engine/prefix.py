"""The prefix cache: what the target and the head know of finished texts, for requests that begin alike.

A new request takes the longest common beginning of any entry, or of a request that is running. Natively a key or value has the
same bits whichever pass made it, so an answer after a cached beginning is the cold start's, token for token.

Sliding windows, recurrent states and compressed caches cannot be cut back to an earlier token: an entry that has them is taken whole, by
a text that goes on from its last token, or not at all."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark.drafters import DSparkDrafter
from dspark.head.context import Context
from dspark.target.target import State, Target

SHORTEST = 16  # a shorter beginning is computed as fast as copied


@dataclass
class Entry:
    """`ids` are the tokens that the target's state holds; the head's drafter (None without a head) knows as many, some perhaps as
    features that it has had no use for yet."""

    ids: np.ndarray
    state: State
    head: DSparkDrafter | None
    used: int = 0

    @property
    def num_bytes(self) -> int:
        return self.state.num_bytes + (0 if self.head is None else self.head.num_bytes)

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

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)

    @property
    def num_tokens(self) -> int:
        return sum(len(entry.ids) for entry in self.entries)

    def add(self, ids: Sequence[int], state: State, head: DSparkDrafter | None) -> None:
        """Keep a finished text. Entries that can be had from another one are no longer needed."""
        new = Entry(np.asarray(ids, dtype=np.int64), state, head, next(self.clock))
        self.entries = [e for e in self.entries if self.usable(new, e.ids) < len(e.ids)]
        if all(self.usable(e, new.ids) < len(new.ids) for e in self.entries):
            self.entries.append(new)

    def usable(self, entry: Entry, ids: np.ndarray) -> int:
        """How many of the first tokens of `ids` this entry can give."""
        size = entry.common(ids)
        return size if size == len(entry.ids) or self.target.can_shorten(entry.state) else 0

    def take(self, ids: Sequence[int], running: Sequence[Entry]) -> tuple[State, Context | None] | None:
        """State and context of the longest known beginning of `ids`, for the caller to go on with; None if none is worth it.

        An entry that the new text only extends is handed over; of others, and of running requests, a copy is made."""
        wanted = np.asarray(ids, dtype=np.int64)
        found = max([*self.entries, *running], key=lambda entry: self.usable(entry, wanted), default=None)
        size = 0 if found is None else self.usable(found, wanted)
        if found is None or size < SHORTEST:
            return None
        found.used = next(self.clock)
        mine = any(entry is found for entry in self.entries)
        if mine and size == len(found.ids):
            self.entries = [entry for entry in self.entries if entry is not found]
            return found.state, context_of(found)
        state = self.target.fork(found.state, size)
        if state is None:
            return None
        context = context_of(found)
        return state, None if context is None else context.fork(size)

    def drop_oldest(self) -> bool:
        """Free the entry that was not used for longest; False if there is none."""
        if not self.entries:
            return False
        oldest = min(self.entries, key=lambda entry: entry.used)
        self.entries = [entry for entry in self.entries if entry is not oldest]
        return True


def context_of(entry: Entry) -> Context | None:
    """The head's, of all its tokens."""
    if entry.head is None:
        return None
    entry.head.flush()
    return entry.head.context
