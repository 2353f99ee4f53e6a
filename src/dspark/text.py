"""Text from tokens as they come: nothing is said that a later token could take back."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

# Tokens that an unfinished character is waited for. One has four bytes at most; what is still broken then is broken for good.
MAX_UNFINISHED = 16
# Tokens that are decoded again with the new ones, at least: decoders look at their neighbours (a word's first space, runs of
# byte tokens).
WINDOW = 4
MAX_WINDOW = 64  # broken bytes alone start a window somewhere


class TextStream:
    """The text of one answer, cut before the first of the `stop` strings.

    `push` costs the new tokens, not the whole answer. Special tokens have no text, but for the ids in `keep`.
    `stopped` says that a stop string was met; from then on there is no more text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), keep: Collection[int] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.hidden = special_ids(tokenizer) - set(keep) if keep else None
        self.ids: list[int] = []  # the window
        self.num_said = 0  # characters of its text that were taken
        self.num_waiting = 0  # tokens since the text last ended in a whole character
        self.held = ""  # may be the start of a stop string
        self.stopped = False
        self.text = ""

    def push(self, ids: Iterable[int]) -> str:
        """The text that is final now that these tokens follow."""
        new = [token for token in ids if self.hidden is None or token not in self.hidden]
        self.ids += new
        self.num_waiting += len(new)
        return self.say(self.take(last=False), last=False)

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        return self.say(self.take(last=True), last=True)

    def take(self, last: bool) -> str:
        text = self.decode(self.ids)
        ready = text if last or self.num_waiting > MAX_UNFINISHED else text.rstrip("\ufffd")
        new = ready[self.num_said :]
        self.num_said = max(self.num_said, len(ready))
        if new or ready == text:
            self.num_waiting = 0
        if ready == text and len(self.ids) >= 2 * WINDOW:
            self.shorten(text)
        return new

    def shorten(self, text: str) -> None:
        """Forget old tokens, where the rest decodes as that part of the whole does: not within a character."""
        for start in range(len(self.ids) - WINDOW, len(self.ids) - 2 * WINDOW, -1):
            rest = self.decode(self.ids[start:])
            if (rest and rest[0] != "\ufffd" and text.endswith(rest)) or start > MAX_WINDOW:
                self.ids, self.num_said = self.ids[start:], len(rest)
                return

    def say(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self.held + new
        cuts = [text.index(s) for s in self.stop if s in text]
        if cuts:
            self.stopped = True
            ready = text[: min(cuts)]
        else:
            ready = text if last else text[: len(text) - max((overlap(text, s) for s in self.stop), default=0)]
        self.held = text[len(ready) :]
        self.text += ready
        return ready

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=self.hidden is None) if ids else ""


def overlap(text: str, stop: str) -> int:
    """Length of the longest ending of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that decoding leaves out."""
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
