"""Grammars: which tokens may follow a text, and which must.

A grammar is compiled by llguidance. It joins a request's law as a logits processor, so that drafting and verification
see the same masked law; tokens that it leaves no choice about are proposed as drafts and verified like any other.
Shapes: V vocabulary of the logits, which may be wider than the tokenizer's."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer

from dspark.errors import SettingError

# White space that a model may put between the parts of a JSON text. Without a bound a small model can go on with it for ever.
JSON_STYLE = {"whitespace_pattern": r"[ \n\t]{0,40}"}
TRAIL = 64  # states kept behind the newest: more than any block, so that a rejected draft is one step back

READY: WeakKeyDictionary[Any, LLTokenizer] = WeakKeyDictionary()


class Syntax(Protocol):
    """How calls are written (`server.syntax.Format`)."""

    @property
    def open_ends(self) -> str: ...

    def grammar(self, tools: Sequence[dict], special: Mapping[str, int], parallel: bool) -> str: ...

    def rest(self, tools: Sequence[dict], special: Mapping[str, int]) -> str: ...

    def opening(self, text: str, quiet: bool) -> tuple[int, int] | None: ...

    def undecided(self, text: str, quiet: bool) -> int: ...

    def kept_ids(self, tokenizer) -> frozenset[int]: ...


class Place(Protocol):
    """Where a grammar stands after a text. Never changed, so that any number of texts can go on from it."""

    def after(self, token: int) -> "Place": ...

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [1, V] with every token masked that may not come next."""

    def forced(self) -> list[int]:
        """The tokens that the grammar leaves no choice about, in the tokenizer's own spelling, the end of the text included."""


def ready(tokenizer) -> LLTokenizer:
    """llguidance's view of a tokenizer; making it takes up to a second, so it is kept as long as the tokenizer."""
    if tokenizer not in READY:
        try:
            READY[tokenizer] = llguidance.hf.from_tokenizer(tokenizer)
        except ValueError as error:
            raise SettingError(f"grammars do not work with this target's tokenizer: {error}", "use a fast tokenizer") from error
    return READY[tokenizer]


class Grammar:
    """A compiled grammar, shared by any number of requests. `end_ids` are the tokens that may end a text; they are allowed
    where the grammar is satisfied and nowhere else.

    Every way to make one raises `SettingError` with llguidance's reason where it cannot be followed."""

    def __init__(self, tokenizer, text: str, end_ids: Collection[int], what: str = "grammar"):
        self.vocabulary = ready(tokenizer)
        self.end_ids = sorted(end_ids)
        if not self.end_ids or not 0 <= self.end_ids[0] <= self.end_ids[-1] < self.vocabulary.vocab_size:
            raise SettingError(f"a grammar cannot end with the end tokens {self.end_ids}", "name tokens that the tokenizer has")
        preferred = tokenizer.eos_token_id
        self.usual_end = preferred if preferred in end_ids else self.end_ids[0]
        failed, messages = LLMatcher.validate_grammar_with_warnings(text, self.vocabulary)
        reason = messages[0].strip() if failed else None
        if not failed:
            self.root = State(self, LLMatcher(self.vocabulary, text, log_level=0))
            reason = None if self.root.allowed_V.any() else "no text satisfies it"
        if reason:
            raise SettingError(f"this {what} cannot be followed: {reason}", "simplify it, or leave it out and check the answer")

    @classmethod
    def from_json_schema(cls, tokenizer, schema: dict | bool, *, end_ids: Collection[int]) -> "Grammar":
        """JSON texts that satisfy a JSON schema; keys in the schema's order."""
        if not isinstance(schema, dict | bool):
            raise SettingError(f"a JSON schema is an object, this is {type(schema).__name__}")
        try:
            text = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=JSON_STYLE)  # type: ignore[arg-type]
        except (ValueError, RecursionError) as error:
            raise SettingError(f"this JSON schema cannot be followed: {error}", "nest it less deeply") from error
        return cls(tokenizer, text, end_ids, "JSON schema")

    @classmethod
    def json_object(cls, tokenizer, *, end_ids: Collection[int]) -> "Grammar":
        """Any JSON object."""
        return cls.from_json_schema(tokenizer, {"type": "object"}, end_ids=end_ids)

    @classmethod
    def from_regex(cls, tokenizer, regex: str, *, end_ids: Collection[int]) -> "Grammar":
        """Texts that match all of a regular expression."""
        return cls(tokenizer, LLMatcher.grammar_from_regex(regex), end_ids, "regular expression")

    @classmethod
    def from_lark(cls, tokenizer, lark: str, *, end_ids: Collection[int]) -> "Grammar":
        """Texts of a grammar in llguidance's variant of Lark."""
        return cls(tokenizer, LLMatcher.grammar_from_lark(lark), end_ids)

    @classmethod
    def for_tools(
        cls, tokenizer, tools: Sequence[dict], choice: str | dict, syntax: Syntax, *, end_ids: Collection[int], parallel: bool = True
    ) -> "Grammar":
        """Calls of `tools` and nothing else: one or more for the choice "required" (one, unless `parallel`), exactly one of
        a named tool, as in {"type": "function", "function": {"name": ...}}."""
        if isinstance(choice, dict):
            name = (choice.get("function") or {}).get("name")
            tools, parallel = [tool for tool in tools if (tool.get("function") or {}).get("name") == name], False
            if not tools:
                raise SettingError(f"tool_choice names {name!r}, which is not among the tools", "name one of them")
        elif choice != "required":
            raise SettingError(f"tool_choice {choice!r} forces no call", 'a grammar is for "required" or a named tool')
        return cls(
            tokenizer, LLMatcher.grammar_from_lark(syntax.grammar(tools, special(tokenizer), parallel)), end_ids, "tool's parameters"
        )

    def matcher(self, num_prompt: int) -> "Matcher":
        """This grammar for the texts of one request, which follow `num_prompt` tokens of prompt."""
        return Matcher(self.root, num_prompt)


def special(tokenizer) -> dict[str, int]:
    """The tokens that a grammar must name, as their text does not match them, and their ids: special ones, and to llguidance
    also other added ones in angle brackets."""
    vocabulary = ready(tokenizer)
    return {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if vocabulary.is_special_token(id)}


@dataclass(frozen=True)
class State:
    """A `Place` in a grammar. Without a matcher the text is over: ended (`intact`), or not of the grammar."""

    grammar: Grammar
    matcher: LLMatcher | None
    intact: bool = True

    def after(self, token: int) -> "State":
        grammar = self.grammar
        if self.matcher is None or token in grammar.end_ids:
            ends = self.intact and token in grammar.end_ids and (self.matcher is None or self.matcher.is_accepting())
            return State(grammar, None, ends)
        if token >= grammar.vocabulary.vocab_size or token in grammar.vocabulary.eos_tokens:
            return State(grammar, None, False)
        fork = self.matcher.deep_copy()
        if fork.try_consume_tokens([token]):
            return State(grammar, fork)
        self.refuse_failure(fork)
        return State(grammar, None, False)

    @cached_property
    def allowed_V(self) -> np.ndarray:
        """Which of the tokenizer's tokens may come next [V], as bits in bytes."""
        size = self.grammar.vocabulary.vocab_size
        bits = np.zeros(size, dtype=np.uint8)
        ends = self.intact
        if self.matcher is not None:
            ends = self.matcher.is_accepting()
            if not self.matcher.is_stopped():
                fork = self.matcher.deep_copy()
                bits = np.unpackbits(np.frombuffer(fork.compute_bitmask(), dtype=np.uint8), count=size, bitorder="little")
                self.refuse_failure(fork)
                bits[self.grammar.vocabulary.eos_tokens] = 0
        bits[self.grammar.end_ids] = ends
        return np.packbits(bits)

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """After an end token only end tokens are allowed; after a text that is not of the grammar nothing is."""
        size, width = self.grammar.vocabulary.vocab_size, logits.shape[-1]
        allowed_V = np.zeros(max(size, width), dtype=bool)
        allowed_V[:size] = np.unpackbits(self.allowed_V, count=size)
        return logits.masked_fill(~torch.from_numpy(allowed_V[:width]).to(logits.device), float("-inf"))

    def forced(self) -> list[int]:
        if self.matcher is None:
            return []
        tokens = self.matcher.deep_copy().compute_ff_tokens()
        fork = self.matcher.deep_copy()
        fork.consume_tokens(tokens)
        return [*tokens, self.grammar.usual_end] if fork.is_stopped() and fork.is_accepting() else tokens

    @staticmethod
    def refuse_failure(matcher: LLMatcher) -> None:
        if matcher.is_error():
            reason = matcher.get_error().partition("<state>")[0].strip()  # what follows is llguidance's own state
            raise SettingError(f"the grammar cannot be followed further: {reason}", "simplify it")


class Matcher:
    """A grammar along one request. What it says of a text depends on that text alone: rows of a draft may be asked in any
    order, and texts grow and shrink. States of the last text asked are kept, so that its next token costs one step."""

    def __init__(self, root: Place, num_prompt: int):
        self.root, self.num_prompt = root, num_prompt
        self.restart()

    def restart(self) -> None:
        # trail[k] is the state after the first `dropped + k` tokens of `answer`
        self.answer: list[int] = []
        self.trail, self.dropped = [self.root], 0

    def processor(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The logits [1, V] with every token masked that may not follow `input_ids` [1, n], prompt included."""
        return self.state(input_ids[0, self.num_prompt :].tolist()).masked(logits)

    def propose(self, ids: Sequence[int]) -> list[int]:
        """The tokens that the grammar leaves no choice about after `ids`, prompt included: worth drafting, to be verified."""
        return self.state(list(ids[self.num_prompt :])).forced()

    def state(self, answer: list[int]) -> Place:
        """The state after these tokens."""
        known = shared(self.answer, answer)
        if known < self.dropped:
            self.restart()
            known = 0
        if known < len(answer):
            del self.answer[known:], self.trail[known - self.dropped + 1 :]
            for token in answer[known:]:
                self.answer.append(token)
                self.trail.append(self.trail[-1].after(token))
            surplus = max(0, len(self.trail) - TRAIL)
            del self.trail[:surplus]
            self.dropped += surplus
        return self.trail[len(answer) - self.dropped]


def shared(one: list[int], other: list[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    size = min(len(one), len(other))
    return size if one[:size] == other[:size] else next(k for k in range(size) if one[k] != other[k])
