"""Finds tool calls in what a model says."""

from collections.abc import Sequence
from dataclasses import dataclass

from dspark.server.syntax import BARE_HEAD, BROKEN, Ends, Format
from dspark.server.tools import schemas


@dataclass(frozen=True)
class Call:
    """The answer's call number `index`; `arguments` is a JSON object as text."""

    index: int
    name: str
    arguments: str


Event = str | Call


class ToolParser:
    """Finds calls in a text that comes in pieces; how it is cut does not matter.

    Text goes out as soon as it cannot be part of a call, a call when it is whole. What looks like a call but is broken, or
    calls no tool of `tools`, stays text; one that the answer's limit cut is neither. White space around calls is left out."""

    def __init__(self, format: Format, tools: Sequence[dict]):
        self.format, self.tools = format, schemas(tools)
        # A strict call is held to its schema from its opening on (engine/lazy.py), so it opens in one way.
        self.bare_head = BARE_HEAD if any(tool["function"].get("strict") for tool in tools) else "{"
        self.buffer = ""  # not yet decided; a call may begin at its beginning if `body` is set
        self.body: int | None = None  # where in the buffer that call is expected after its opening tag
        self.ends: Ends = format.ends()
        self.white = ""  # white space at the end of the text said so far
        self.quiet = True  # only white space was said, since the beginning or the last call
        self.num_calls = 0

    def push(self, text: str) -> list[Event]:
        """The next piece of the text; what is decided by now."""
        self.buffer += text
        return self.read(final=False)

    def finish(self, cut: bool = False) -> list[Event]:
        """The text is over; the rest of the events. A last call may lack its closing tag. `cut`: the text would go on, so a call
        that is begun at its end, or an opening tag, is left out: nobody can use it."""
        events = self.read(final=True, cut=cut)
        if self.white and not (self.quiet and self.num_calls):
            events.append(self.white)
        self.white = ""
        return events

    def read(self, final: bool, cut: bool = False) -> list[Event]:
        events: list[Event] = []
        while self.buffer:
            if self.body is None:
                found = self.format.opening(self.buffer, self.quiet, self.bare_head)
                waiting = 0 if final and not cut else self.format.undecided(self.buffer, self.quiet, self.bare_head)
                self.say(events, found[0] if found else len(self.buffer) - waiting)
                if not found:
                    if cut and waiting:
                        self.buffer = self.white = ""
                    break
                self.body, self.ends = found[1] - found[0], self.format.ends()
            outcome = self.judge(final)
            if outcome is None:
                if cut and self.format.begun(self.buffer):
                    self.buffer = self.white = ""
                elif final:  # a call cut short, with all that its strings hold
                    self.say(events, len(self.buffer))
                break
            calls, end = outcome
            if calls:
                events += [Call(self.num_calls + k, *call) for k, call in enumerate(calls)]
                self.num_calls += len(calls)
                self.buffer, self.white, self.quiet = self.buffer[end:], "", True
            else:
                self.say(events, end)
            self.body = None
        return events

    def judge(self, final: bool) -> tuple[list[tuple[str, str]], int] | None:
        """The calls at the beginning of the buffer (none: it is text) and where they end; None: not decided yet."""
        assert self.body is not None
        begin = len(self.buffer) - len(self.buffer[self.body :].lstrip())
        if begin == len(self.buffer):
            return None
        end = self.ends.find(self.buffer, begin)
        if end is None:
            return None
        if end == BROKEN:
            return [], max(self.body, 1)
        calls = self.format.read(self.buffer[begin:end], self.tools)
        rest = self.buffer[end:].lstrip()
        if calls and rest.startswith(self.format.closes):
            return calls, len(self.buffer) - len(rest) + len(self.format.closes)
        if calls and self.format.closes.startswith(rest):
            return (calls, len(self.buffer)) if final else None
        return [], end

    def say(self, events: list[Event], size: int) -> None:
        """The buffer's first `size` characters are text; white space waits until it is known what comes after it."""
        text, self.buffer = self.white + self.buffer[:size], self.buffer[size:]
        if self.quiet and self.num_calls:
            text = text.lstrip()
        said = text.rstrip()
        self.white = text[len(said) :]
        if said:
            self.quiet = False
            events.append(said)
