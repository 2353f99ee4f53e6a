"""The syntaxes in which models write tool calls: what a call looks like, where one ends, and its grammar."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from dspark.engine.grammar import JSON_STYLE
from dspark.server.tools import NAME, schemas
from dspark.text import overlap

BROKEN = -1  # where a call ends that is none
BARE_HEAD = '{"name": "'  # of a call without an opening tag, as the templates that have such calls show it
BEFORE_BARE = re.compile(r"\s*(?:;\s*)?")


class Ends(Protocol):
    """Finds where a call ends in a text that grows; an object serves one call."""

    def find(self, text: str, begin: int) -> int | None:
        """The index after the call that begins at `begin`; None if `text` does not hold it all yet; `BROKEN` if it is none."""


@dataclass(frozen=True)
class Format:
    """One syntax of calls: `opens`, a call, `closes`. Here a call is `{"name": ..., ARGUMENTS: {...}}`.

    `array`: the calls of an answer are one JSON array. `bare`: a call at the very beginning needs no `opens`.
    `told`: the chat template itself tells the model of its tools."""

    name: str
    opens: str
    closes: str = ""
    arguments: str = "arguments"
    array: bool = False
    bare: bool = False
    told: bool = True
    gap = "\n"  # around a call within its tags, and between two

    @property
    def tags(self) -> tuple[str, ...]:
        return (self.opens, self.closes)

    @property
    def open_ends(self) -> str:
        """The characters that an opening may end with."""
        return self.opens[-1] + (BARE_HEAD[-1] if self.bare else "")

    def kept_ids(self, tokenizer) -> frozenset[int]:
        """The special tokens that are part of the syntax: text must be decoded with them."""
        added = tokenizer.added_tokens_decoder.items()
        return frozenset(id for id, token in added if token.special and token.content in self.tags)

    def text(self, calls: Iterable[tuple[str, dict]]) -> str:
        """Calls (name, arguments) as the model would write them."""
        written = [self.call(name, arguments) for name, arguments in calls]
        if self.array:
            return f"{self.opens}[{', '.join(written)}]"
        return self.gap.join(call if self.bare else f"{self.opens}{self.gap}{call}{self.gap}{self.closes}" for call in written)

    def call(self, name: str, arguments: dict) -> str:
        return json.dumps({"name": name, self.arguments: arguments}, ensure_ascii=False)

    def ends(self) -> Ends:
        return ValueEnd("[" if self.array else "{")

    def read(self, text: str, tools: Mapping[str, dict]) -> list[tuple[str, str]]:
        """(name, arguments as JSON) of a call or an array of them; none if any of it is no call of `tools` (name -> schema)."""
        try:
            record = json.loads(text)
            calls = []
            for call in record if isinstance(record, list) else [record]:
                arguments = call.get("arguments", call.get("parameters", {}))
                if call.get("name") not in tools or not isinstance(arguments, dict):
                    return []
                calls.append((call["name"], as_json(arguments)))
        except (ValueError, TypeError, AttributeError, RecursionError):
            return []
        return calls

    def opening(self, text: str, quiet: bool, bare_head: str = BARE_HEAD) -> tuple[int, int] | None:
        """Where in a text the first call may begin, and what follows its opening tag. `quiet`: the text stands at the
        beginning of an answer, or right after a call, where a bare call may begin with `bare_head`."""
        if self.bare and quiet and text.startswith(bare_head, bare := bare_begin(text)):
            return 0, bare
        begin = text.find(self.opens)
        return None if begin < 0 else (begin, begin + len(self.opens))

    def undecided(self, text: str, quiet: bool, bare_head: str = BARE_HEAD) -> int:
        """How many characters at the end of a text without an opening may turn out to begin a call."""
        if self.bare and quiet and bare_head.startswith(text[bare_begin(text) :]):
            return len(text)
        return overlap(text, self.opens)

    def begun(self, text: str) -> bool:
        """Whether a text that begins as a call and lacks its end is one as far as it goes, and not JSON of another kind."""
        if text.startswith(self.opens):
            return True
        seen, head = ("".join(part.split()) for part in (text[bare_begin(text) :], BARE_HEAD))
        return seen.startswith(head) or head.startswith(seen)

    # Grammars

    def grammar(self, tools: Sequence[dict], special: Mapping[str, int], parallel: bool) -> str:
        """A Lark grammar of one call, or of several where `parallel` and the syntax allow it. `special` are the
        tokens that a grammar must name, and their ids. Raises `SettingError` for a tool that cannot be called."""
        body, rules = self.body(schemas(tools), special, parallel)
        if self.bare:  # models with this syntax were trained on one call a turn
            return lark(f"start: {body}", *rules)
        more = f"({literal(self.gap)} tagged)*" if parallel and not self.array else ""
        return lark(f"start: tagged {more}", f"tagged: {tag(self.opens, special)} {body}", *rules)

    def rest(self, tools: Sequence[dict], special: Mapping[str, int]) -> str:
        """A Lark grammar of what follows the opening of a call, and of any text after it that opens no other.
        Arguments of functions that are not `strict` may be any object. Raises `SettingError` as `grammar` does."""
        strict = {tool["function"]["name"] for tool in tools if tool["function"].get("strict")}
        found = {name: schema if name in strict else {"type": "object"} for name, schema in schemas(tools).items()}
        body, rules = self.body(found, special, parallel=True)
        return lark(f"start: {body} TAIL?", f"TAIL: /(?s:.+)/ & ~/{holding(self.opens)}/", *rules)

    def body(self, tools: Mapping[str, dict], special: Mapping[str, int], parallel: bool) -> tuple[str, list[str]]:
        """What follows `opens`, in Lark, and the rules it needs; `tools` are names and schemas."""
        rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
        for i, (name, schema) in enumerate(tools.items()):
            rules += self.rules(f"call_{i}", name, schema, special)
        if self.array:
            return f'" "? "[" call {MORE_ITEMS if parallel else ""} "]"', rules
        if self.bare or not self.gap:
            return f"call {literal(self.closes)}", rules
        return f"{literal(self.gap)} call {literal(self.gap)} {tag(self.closes, special)}", rules

    def rules(self, rule: str, name: str, schema: dict, special: Mapping[str, int]) -> list[str]:
        """The Lark rules of one function's call."""
        # one spelling of what surrounds the arguments, so that most of it is forced
        head = f'{{"name": "{name}", "{self.arguments}": '
        return [f'{rule}: {literal(head)} {json_value(schema)} "}}"']


class Named(Format):
    """The name and its arguments stand apart: `name[ARGS]{...}`, with an id of the call between them in some models."""

    gap = ""
    HEAD = re.compile(rf"({NAME.pattern})(?:\[CALL_ID\]\w{{0,64}})?\[ARGS\]\s*(?=\{{)")
    HEAD_BEGUN = re.compile(r"[A-Za-z0-9_.-]{0,64}(?:\[[A-Z_]{0,7}(?:\]\w{0,64}(?:\[[A-Z]{0,4}(?:\]\s*)?)?)?)?")

    @property
    def tags(self) -> tuple[str, ...]:
        return (self.opens, "[CALL_ID]", "[ARGS]")

    def call(self, name: str, arguments: dict) -> str:
        return f"{name}[ARGS]{json.dumps(arguments, ensure_ascii=False)}"

    def ends(self) -> Ends:
        return NamedEnd()

    def read(self, text: str, tools: Mapping[str, dict]) -> list[tuple[str, str]]:
        head = self.HEAD.match(text)
        try:
            return [(head[1], as_json(json.loads(text[head.end() :])))] if head and head[1] in tools else []
        except (ValueError, RecursionError):
            return []

    def rules(self, rule: str, name: str, schema: dict, special: Mapping[str, int]) -> list[str]:
        # models that write ids were trained to, and know whether they do
        id = f"({tag('[CALL_ID]', special)} /[A-Za-z0-9]{{9}}/)?" if "[CALL_ID]" in special else ""
        return [f"{rule}: {literal(name)} {id} {tag('[ARGS]', special)} {json_value(schema)}"]


def bare_begin(text: str) -> int:
    return len(BEFORE_BARE.match(text)[0])  # type: ignore[index]


HERMES = Format("hermes", "<tool_call>", "</tool_call>")
LLAMA3 = Format("llama3", "<|python_tag|>", arguments="parameters", bare=True)
MISTRAL = Format("mistral", "[TOOL_CALLS]", array=True)
MISTRAL_ARGS = Named("mistral-args", "[TOOL_CALLS]")
DESCRIBED = replace(HERMES, name="described", told=False)


# Pieces of Lark ---------------------------------------------------------------------------

MORE_ITEMS = '(", " call)*'


def lark(*rules: str) -> str:
    return "\n".join(rules)


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def tag(text: str, special: Mapping[str, int]) -> str:
    return f"<[{special[text]}]>" if text in special else literal(text)


def holding(text: str) -> str:
    """A regular expression of the texts that hold this one."""
    escaped = re.escape(text).replace("/", r"\/")
    return f"(?s:.*){escaped}(?s:.*)"


def json_value(schema: dict | bool) -> str:
    return f"%json {json.dumps({'x-guidance': JSON_STYLE} | schema if isinstance(schema, dict) else schema)}"


def as_json(arguments: dict) -> str:
    """Raises `ValueError` for numbers beyond a float's range: they would be written as Infinity, which is not JSON."""
    return json.dumps(arguments, allow_nan=False)


# Where calls end --------------------------------------------------------------------------


class ValueEnd:
    """Finds where a JSON object or array ends, looking at each character once however often it is asked."""

    def __init__(self, first: str) -> None:
        self.first = first
        self.at, self.depth, self.quoted, self.escaped = 0, 0, False, False

    def find(self, text: str, begin: int) -> int | None:
        if text[begin] != self.first:
            return BROKEN
        if self.depth == 0 and self.at > begin:
            return self.at
        for at in range(max(self.at, begin), len(text)):
            character = text[at]
            if self.escaped:
                self.escaped = False
            elif self.quoted:
                self.escaped, self.quoted = character == "\\", character != '"'
            elif character == '"':
                self.quoted = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth == 0:
                    self.at = at + 1
                    return self.at
        self.at = len(text)
        return None


class NamedEnd:
    """Of `Named`'s calls."""

    def __init__(self) -> None:
        self.value: int | None = None  # where the arguments begin
        self.end = ValueEnd("{")

    def find(self, text: str, begin: int) -> int | None:
        if self.value is None:
            head = Named.HEAD.match(text, begin)
            if not head:
                return None if Named.HEAD_BEGUN.fullmatch(text, begin) else BROKEN
            self.value = head.end()
        return self.end.find(text, self.value)
