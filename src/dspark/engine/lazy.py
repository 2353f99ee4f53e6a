"""Grammars that hold only within tool calls: a text is free until it opens a call, and free again after it.

Outside of a call no token is masked, but for those that would open one and go on, in the same token, in a way that no call
does. Within a call the law is the target's own given the tokens that the call's grammar allows."""

from codecs import utf_8_decode
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from llguidance import LLMatcher

from dspark.engine.grammar import Grammar, Matcher, Place, State, Syntax, ready, special
from dspark.text import special_ids


@dataclass(frozen=True)
class Pieces:
    """The bytes of each token in the text that is searched for calls, and the tokens that may open a call and go on."""

    bytes_of: list[bytes]
    suspects: list[int]


READY: WeakKeyDictionary[Any, dict[Syntax, Pieces]] = WeakKeyDictionary()


def pieces(tokenizer, syntax: Syntax) -> Pieces:
    """Looking at each token takes a tenth of a second, so what comes of it is kept as long as the tokenizer."""
    known = READY.setdefault(tokenizer, {})
    if syntax not in known:
        vocabulary, hidden = ready(tokenizer), special_ids(tokenizer) - syntax.kept_ids(tokenizer)
        bytes_of = [b"" if token in hidden else vocabulary.decode_bytes([token]) for token in range(vocabulary.vocab_size)]
        ends = [end.encode() for end in syntax.open_ends]
        suspects = [token for token, piece in enumerate(bytes_of) if any(end in piece[:-1] for end in ends)]
        known[syntax] = Pieces(bytes_of, suspects)
    return known[syntax]


class LazyGrammar:
    """Calls of `tools` as the model writes them follow their JSON schemas where a function is `strict`; arguments of the
    others are any object. Shared by any number of requests. Raises `SettingError` for a schema that cannot be followed."""

    def __init__(self, tokenizer, tools: Sequence[dict], syntax: Syntax, *, end_ids: Collection[int]):
        self.syntax = syntax
        rest = LLMatcher.grammar_from_lark(syntax.rest(tools, special(tokenizer)))
        self.call = Grammar(tokenizer, rest, end_ids, "tool's parameters")
        self.pieces = pieces(tokenizer, syntax)
        self.root = Free(self)
        self.broken_after: dict[Free, list[int]] = {}  # what `Free.broken` found

    def matcher(self, num_prompt: int) -> Matcher:
        """This grammar for the texts of one request, which follow `num_prompt` tokens of prompt."""
        return Matcher(self.root, num_prompt)

    def piece(self, token: int) -> bytes:
        return self.pieces.bytes_of[token] if token < len(self.pieces.bytes_of) else b""

    def follow(self, matcher: LLMatcher, text: bytes) -> LLMatcher | None:
        """The matcher after more text; None if that is not of the grammar."""
        fork = matcher.deep_copy()
        return fork if fork.consume_tokens(self.call.vocabulary.tokenize_bytes(text)) else None


@dataclass(frozen=True)
class Free:
    """Outside of a call. `held` may begin one, `partial` are the first bytes of a character; `quiet`: only white space came
    since the beginning or the last call."""

    grammar: LazyGrammar
    held: str = ""
    partial: bytes = b""
    quiet: bool = True

    def after(self, token: int) -> Place:
        return self.read(self.grammar.piece(token))

    def read(self, piece: bytes) -> Place:
        if not piece:
            return self
        grammar, piece = self.grammar, self.partial + piece
        new, used = utf_8_decode(piece, "replace", False)
        text, partial = self.held + new, piece[used:]
        opened = grammar.syntax.opening(text, self.quiet)
        if opened:
            root = grammar.call.root
            assert root.matcher is not None
            inside = grammar.follow(root.matcher, text[opened[1] :].encode() + partial)
            return InCall(grammar, State(grammar.call, inside, intact=False))
        said = len(text) - grammar.syntax.undecided(text, self.quiet)
        return Free(grammar, text[said:], partial, self.quiet and not text[:said].strip())

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        broken = self.broken()
        return logits.index_fill(-1, torch.tensor(broken, device=logits.device), float("-inf")) if broken else logits

    def broken(self) -> list[int]:
        """The tokens that open a call and break it."""
        known = self.grammar.broken_after
        if self not in known:
            known[self] = [token for token in self.grammar.pieces.suspects if is_broken(self.after(token))]
        return known[self]

    def forced(self) -> list[int]:
        return []


@dataclass(frozen=True)
class InCall:
    """Within a call, which is over as soon as the grammar of one is satisfied."""

    grammar: LazyGrammar
    state: State

    def after(self, token: int) -> Place:
        state = self.state.after(token)
        if state.matcher is None or not state.matcher.is_accepting():
            return InCall(self.grammar, state)
        return self.grammar.root.read(self.surplus(token))

    def surplus(self, token: int) -> bytes:
        """What the token that ends the call says after it."""
        piece, matcher = self.grammar.piece(token), self.state.matcher
        assert matcher is not None
        for size in range(1, len(piece)):
            fork = self.grammar.follow(matcher, piece[:size])
            if fork is not None and fork.is_accepting():
                return piece[size:]
        return b""

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        return self.state.masked(logits)

    def forced(self) -> list[int]:
        return self.state.forced()


def is_broken(place: Place) -> bool:
    return isinstance(place, InCall) and place.state.matcher is None
