"""From the engine's events to what the client is told: text, calls, log-probabilities, usage, in OpenAI's words."""

import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark.engine.request import Finished, Logprob, Tokens
from dspark.server.asks import Ask
from dspark.text import TextStream

LEAST_LOGPROB = -9999.0  # OpenAI's word for impossible, where JSON has no infinity


@dataclass
class Delta:
    """What one event adds to an answer: text, whole tool calls, log-probabilities, and each token's text and source."""

    text: str = ""
    calls: list[Any] = field(default_factory=list)  # calls.Call
    logprobs: list[tuple[int, Logprob]] = field(default_factory=list)
    sources: list[dict] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.calls or self.logprobs)

    def add(self, other: "Delta") -> None:
        self.text += other.text
        self.calls += other.calls
        self.logprobs += other.logprobs
        self.sources += other.sources


class Answer:
    """One answer. `reason` says why it ended, as OpenAI does, which may be before the engine notices; `whole` is all of it so far.

    The limit of tokens is named even where calls were found: more of them may have been cut."""

    def __init__(self, ask: Ask, tokenizer: Any, eos_ids: frozenset[int]):
        self.ask, self.eos_ids = ask, eos_ids
        self.parser: Any = None
        if ask.syntax is not None:
            from dspark.server.calls import ToolParser

            self.parser = ToolParser(ask.syntax, ask.tools)
        self.texts = TextStream(tokenizer, ask.request.stop, ask.syntax.kept_ids(tokenizer) if ask.syntax else ())
        self.whole = Delta(ask.begin)
        self.ids: list[int] = []
        self.reason: str | None = None
        self.finished: Finished | None = None
        self.last_source = "plain"

    def hear(self, event: Tokens | Finished) -> Delta:
        """What this event adds."""
        delta = Delta()
        if isinstance(event, Finished):
            self.finished = event
            if self.reason is None:
                cut = event.reason == "length"
                self.read(self.texts.finish(), delta, last=True, cut=cut)
                if delta.text:
                    delta.sources.append({"text": delta.text, "source": self.last_source})
                self.reason = "tool_calls" if (self.whole.calls or delta.calls) and event.reason == "stop" else event.reason
        else:
            logprobs: Sequence[Logprob | None] = event.logprobs or [None] * len(event.ids)
            for token, source, logprob in zip(event.ids, event.sources, logprobs, strict=True):
                if self.reason is not None:
                    break
                self.take(token, source, logprob, delta)
        self.whole.add(delta)
        return delta

    def take(self, token: int, source: str, logprob: Logprob | None, delta: Delta) -> None:
        self.ids.append(token)
        self.last_source = source
        before = len(delta.text)
        if token not in self.eos_ids:
            self.read(self.texts.push([token]), delta)
            if logprob is not None:
                delta.logprobs.append((token, logprob))
        delta.sources.append({"text": delta.text[before:], "source": source})
        if self.texts.stopped and self.reason is None:
            self.reason = "stop"

    def read(self, text: str, delta: Delta, last: bool = False, cut: bool = False) -> None:
        if self.parser is None:
            delta.text += text
            return
        for event in [*self.parser.push(text), *(self.parser.finish(cut) if last else ())]:
            if isinstance(event, str):
                delta.text += event
                continue
            delta.calls.append(event)
            if self.ask.one_call:
                self.reason = "tool_calls"
                return


def usage(answers: Sequence[Answer]) -> dict:
    """Of a whole request: each prompt counts once, however many answers it gets."""
    ended = [answer.finished for answer in answers if answer.finished is not None]
    first = {answer.ask.prompt: answer for answer in reversed(answers)}.values()
    prompt = sum(len(answer.ask.request.prompt_ids) for answer in first)
    completion = sum(len(answer.ids) for answer in answers)
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.finished.cached_tokens for answer in first if answer.finished)},
    }
    if any(answer.ask.request.predicted_ids for answer in answers):
        found = sum(num_predicted(answer) for answer in answers)
        given = sum(len(answer.ask.request.predicted_ids) for answer in answers)
        counts["completion_tokens_details"] = {"accepted_prediction_tokens": found, "rejected_prediction_tokens": given - found}
    names = ("rounds", "drafted", "verified", "accepted")
    counts["dspark"] = {name: sum(getattr(finished, name) for finished in ended) for name in names} | {
        "seconds": round(max((finished.seconds for finished in ended), default=0.0), 6),
        "saved_seconds": round(sum(finished.saved_seconds for finished in ended), 6),
    }
    return counts


def num_predicted(answer: Answer) -> int:
    """Tokens of the prediction that the answer has, each as often as it has them."""
    return (Counter(answer.ask.request.predicted_ids) & Counter(answer.ids)).total()


# ---- OpenAI's words


def chat_choice(index: int, answer: Answer, vocabulary: "Vocabulary") -> dict:
    calls = [tool_call(call) for call in answer.whole.calls]
    text = answer.whole.text
    message = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
    return {
        "index": index,
        "message": message | ({"tool_calls": calls} if calls else {}),
        "logprobs": chat_logprobs(answer.ask, answer.whole, vocabulary),
        "finish_reason": answer.reason,
    }


def chat_delta(index: int, answer: Answer, delta: Delta, vocabulary: "Vocabulary") -> dict:
    said: dict[str, Any] = {"content": delta.text} if delta.text else {}
    if delta.calls:
        said["tool_calls"] = [{"index": call.index} | tool_call(call) for call in delta.calls]
    return {"index": index, "delta": said, "logprobs": chat_logprobs(answer.ask, delta, vocabulary), "finish_reason": None}


def tool_call(call: Any) -> dict:
    name = f"call_{uuid.uuid4().hex[:24]}"
    return {"id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def chat_logprobs(ask: Ask, delta: Delta, vocabulary: "Vocabulary") -> dict | None:
    if ask.request.logprobs is None:
        return None
    content = [
        vocabulary.entry(token, found.logprob) | {"top_logprobs": [vocabulary.entry(*other) for other in found.top[: ask.request.logprobs]]}
        for token, found in delta.logprobs
    ]
    return {"content": content, "refusal": None}


def completion_choice(index: int, answer: Answer, delta: Delta, vocabulary: "Vocabulary", offset: int = 0, last: bool = True) -> dict:
    """A whole answer or a part of one: `delta`, whose log-probabilities begin at character `offset` of the answer."""
    logprobs = completion_logprobs(answer.ask, delta, vocabulary, offset)
    return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": answer.reason if last else None}


def completion_logprobs(ask: Ask, delta: Delta, vocabulary: "Vocabulary", offset: int) -> dict | None:
    if ask.request.logprobs is None:
        return None
    texts = [vocabulary.text(token) for token, _ in delta.logprobs]
    top = [best_texts(found, ask.request.logprobs, vocabulary) for _, found in delta.logprobs]
    return {
        "tokens": texts,
        "token_logprobs": [bounded(found.logprob) for _, found in delta.logprobs],
        "top_logprobs": top if ask.request.logprobs else None,
        "text_offset": [offset + sum(map(len, texts[:k])) for k in range(len(texts))],
    }


def best_texts(found: Logprob, count: int, vocabulary: "Vocabulary") -> dict[str, float]:
    """Text -> log-probability; of tokens of the same text the best."""
    return {vocabulary.text(token): bounded(logprob) for token, logprob in reversed(found.top[:count])}


def bounded(logprob: float) -> float:
    return max(LEAST_LOGPROB, logprob)


class Vocabulary:
    """The bytes that each token stands for, which need not be whole characters."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.byte_level = "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
        self.added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}

    def bytes(self, token: int) -> bytes:
        if token in self.added:
            return self.added[token].encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # rows of the output matrix that are no token
            return b""
        if self.byte_level:
            return bytes(BYTE_OF[character] for character in piece if character in BYTE_OF)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def text(self, token: int) -> str:
        return self.bytes(token).decode(errors="replace")

    def entry(self, token: int, logprob: float) -> dict:
        return {"token": self.text(token), "logprob": bounded(logprob), "bytes": list(self.bytes(token))}


def byte_letters() -> Iterable[tuple[str, int]]:
    """The letters that byte-level tokenizers write bytes with: printable bytes as themselves, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    yield from ((chr(byte), byte) for byte in printable)
    yield from ((chr(0x100 + k), byte) for k, byte in enumerate(others))


BYTE_OF = dict(byte_letters())
