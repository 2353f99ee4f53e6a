"""Grammars that hold only within tool calls: a free text keeps the target's own law, a call follows its schema."""

import json
import random
import re
from functools import cache
from itertools import product

import pytest
import torch

from dspark.core.sampling import Law
from dspark.engine.grammar import Grammar
from dspark.engine.lazy import Free, LazyGrammar
from dspark.errors import SettingError
from dspark.generation import make_law
from dspark.server.calls import Call, ToolParser
from dspark.server.syntax import DESCRIBED, HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, Format
from dspark.server.xml_syntax import QWEN3_CODER
from dspark.target.target import Target
from dspark.text import overlap
from masked import answers_together, masked_case, wide_target
from test_law import DRAFTS, LAWS, PLANS, PROMPT, Case, bias, one_hot
from words import END, TEMPLATES, word_tokenizer

# The law ---------------------------------------------------------------------------------


class Tiny:
    """`ab` opens a call, which is `ac`."""

    open_ends = "b"

    def opening(self, text, quiet):
        return (text.index("ab"), text.index("ab") + 2) if "ab" in text else None

    def undecided(self, text, quiet):
        return overlap(text, "ab")

    def rest(self, tools, special):
        return 'start: "ac" TAIL?\nTAIL: /(?s:.+)/ & ~/(?s:.*)ab(?s:.*)/'

    def kept_ids(self, tokenizer):
        return frozenset()


# The fifth text of a, b, c, `word`, the end: opens a call and breaks it; opens one and begins it; ends one and goes on.
WORDS = ("bc", "ba", "ca")
STOP = 4


@cache
def tiny_grammar(word: str) -> LazyGrammar:
    return LazyGrammar(word_tokenizer(alphabet="abc", words=[word], special=["$"]), [], Tiny(), end_ids=[STOP])


def standing(word: str, answer: tuple[int, ...]) -> str:
    """Where a text stands, said without the grammar: free, in a call, or broken."""
    text, begin = "".join(("a", "b", "c", word, "$")[token] for token in answer), 0
    while True:
        opened = re.compile(r"a\$*b").search(text, begin)  # ends are no part of the text
        if not opened:
            return "free"
        rest = text[opened.end() :]
        if not rest.startswith("ac"):
            return "call" if "ac".startswith(rest) else "broken"
        begin = opened.end() + 2


def may_follow(word: str, answer: tuple[int, ...]) -> list[int]:
    return [token for token in range(5) if standing(word, (*answer, token)) != "broken"]


@pytest.mark.parametrize("word", WORDS)
def test_only_calls_are_masked(word):
    matcher = tiny_grammar(word).matcher(len(PROMPT))
    answers = [answer for size in range(7) for answer in product(range(5), repeat=size) if standing(word, answer) != "broken"]
    random.Random(0).shuffle(answers)
    seen = set()
    for answer in answers:
        logits = torch.zeros(1, 7)  # two rows without a token
        masked = matcher.processor(torch.tensor([PROMPT + answer]), logits)
        allowed = torch.isfinite(masked[0]).nonzero()[:, 0].tolist()
        where = standing(word, answer)
        assert allowed == may_follow(word, answer) + ([5, 6] if where == "free" else []), answer
        if where == "free" and len(allowed) == 7:
            assert masked is logits
        seen.add((where, len(allowed)))
    assert {("free", 7), ("call", 1)} <= seen and (("free", 6) in seen) == (word == "bc")


def lazy_case(word: str, law: Law, draft: str) -> Case:
    return masked_case(tiny_grammar(word).matcher(len(PROMPT)), law, draft, lambda answer: standing(word, answer) != "broken")


@pytest.mark.parametrize("draft", [*DRAFTS, "forced"])
@pytest.mark.parametrize("law", ["greedy", "T=1", "top-k", "repetition"])
@pytest.mark.parametrize("word", WORDS)
def test_a_round_has_the_law_of_the_target(word, law, draft):
    case = lazy_case(word, LAWS[law], draft)
    for block_size, plan in product((1, 3), PLANS.values()):
        assert bias(case, plan, block_size) < 1e-12


@pytest.mark.parametrize("word", WORDS)
def test_the_law_is_the_targets_own_given_what_may_follow(word):
    case, rng = lazy_case(word, LAWS["T=1"], "random"), torch.Generator().manual_seed(0)
    table = torch.randn(5, 5, 5, generator=rng, dtype=torch.float64)
    for answer in product(range(5), repeat=3):
        if standing(word, answer) == "broken":
            continue
        expected = table[(PROMPT + answer)[-2:]].softmax(-1)
        if standing(word, answer) == "call" or len(may_follow(word, answer)) < 5:
            expected = expected * torch.stack([one_hot(token) for token in may_follow(word, answer)]).sum(0)
        assert (case.p(PROMPT + answer) - expected / expected.sum()).abs().max() < 1e-15


# Calls -----------------------------------------------------------------------------------

FORMATS = {format.name: format for format in (DESCRIBED, HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, QWEN3_CODER)}
SPECIAL = (END, "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<|think|>")
PIECES = ["tool_call", '{"name', '": "', '"}}', "call>", "l>{", "\n</parameter>", "}}\n", "call>\n", "l>\n\nSo", '"weather', '"mark']


def tool(name: str, parameters: dict, strict: bool | None = None) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters} | ({} if strict is None else {"strict": strict})}


CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"], "additionalProperties": False}
MARK = {"properties": {"n": {"type": "integer", "minimum": 1, "maximum": 99}}, "required": ["n"], "additionalProperties": False}
TOOLS = [tool("weather", CITY, True), tool("mark", MARK, True), tool("note", {"properties": {"n": {"type": "integer"}}})]


@cache
def tokenizer_of(name: str):
    return word_tokenizer(TEMPLATES[name], words=PIECES, special=SPECIAL)


@cache
def grammar_of(name: str) -> LazyGrammar:
    tokenizer = tokenizer_of(name)
    return LazyGrammar(tokenizer, TOOLS, FORMATS[name], end_ids=[tokenizer.eos_token_id])


def read(format: Format, text: str) -> list:
    parser = ToolParser(format, TOOLS)
    return [*parser.push(text), *parser.finish()]


def written(format: Format, *calls: tuple[str, dict]) -> str:
    return format.text(calls)


def first_refused(name: str, ids: list[int]) -> int | None:
    """The position of the first token that is masked after those before it."""
    matcher = grammar_of(name).matcher(0)
    for k, token in enumerate(ids):
        if not torch.isfinite(matcher.processor(torch.tensor([ids[:k]], dtype=torch.long), torch.zeros(1, 400))[0, token]):
            return k
    return None


GOOD = [("weather", {"city": "Oslo"}), ("mark", {"n": 7}), ("note", {"n": "any", "more": [1]})]
BAD = [
    ("weather", {"city": "Bonn"}),
    ("weather", {}),
    ("mark", {"n": 0}),
    ("mark", {"n": "x"}),
    ("mark", {"n": 5, "m": 1}),
    ("rm", {"n": 1}),
]


@pytest.mark.parametrize("name", FORMATS)
def test_calls_follow_their_schemas_and_texts_are_free(name):
    format, tokenizer = FORMATS[name], tokenizer_of(name)
    for call in GOOD:
        for before, after in (("", ""), ("I look: <tool {", " Done. é"), ("<|think|>hm", "\n\nSo")):
            tag = format.opens if before and format is LLAMA3 else ""
            text = f"{before}{tag}{written(format, call)}{after}"
            assert first_refused(name, tokenizer.encode(text)) is None, text
    for call in BAD:
        text = written(format, call)
        at = first_refused(name, tokenizer.encode(text))
        assert at is not None and len(tokenizer.decode(tokenizer.encode(text)[:at])) < len(text), text
    assert first_refused(name, tokenizer.encode('Text <b> {"name": 1} <function=weather> [ARGS]{} é <tool_cal>')) is None


@pytest.mark.parametrize("name", FORMATS)
def test_several_calls_follow_one_another(name):
    format, tokenizer = FORMATS[name], tokenizer_of(name)
    good, bad = GOOD[:2] * 2, [*GOOD, BAD[0]]
    # as many as it has in one text; Llama 3 has one a text, and several after one another
    join = lambda calls: "; ".join(written(format, call) for call in calls) if format is LLAMA3 else written(format, *calls)  # noqa: E731
    assert first_refused(name, tokenizer.encode(join(good))) is None
    assert [event.name for event in read(format, join(good))] == ["weather", "mark"] * 2
    at = first_refused(name, tokenizer.encode(join(bad)))
    assert at is not None and "any" in tokenizer.decode(tokenizer.encode(join(bad))[:at])


def test_a_call_without_a_tag_opens_at_the_beginning_only():
    ids = tokenizer_of("llama3").encode
    assert first_refused("llama3", ids('As JSON: {"name": "rm"}')) is None
    assert first_refused("llama3", ids(' \n{"name": "rm"}')) is not None
    assert first_refused("llama3", ids('{"title": "rm", "name": "weather"}')) is None
    # what opens otherwise is no call, as it was held to no schema
    for text in ('{"name":"weather","parameters":{}}', '{"parameters": {}, "name": "weather"}'):
        assert first_refused("llama3", ids(text)) is None and read(LLAMA3, text) == [text]


def fitting(call: Call) -> bool:
    arguments = json.loads(call.arguments)
    if call.name == "weather":
        return arguments in ({"city": "Oslo"}, {"city": "Rome"})
    return call.name == "note" or (set(arguments) == {"n"} and type(arguments["n"]) is int and 1 <= arguments["n"] <= 99)


def draw(name: str, seed: int, masked: bool, limit: int = 120) -> list[int]:
    """A text of a model that loves calls and gets them wrong: pieces of calls in any order."""
    tokenizer, rng, matcher = tokenizer_of(name), random.Random(seed), grammar_of(name).matcher(0)
    loved = [tokenizer.encode(written(FORMATS[name], call)) for call in (*GOOD, *BAD)]
    loved += [tokenizer.encode(text) for text in ("\n", FORMATS[name].opens, "}}", " é", '"city": "Rome"')]
    ids: list[int] = []
    while len(ids) < limit:
        for token in rng.choice(loved)[rng.choice([0, 0, 0, 2]) : rng.choice([3, 99, 99])]:
            chosen = token
            logits = torch.zeros(1, 400)
            if masked:
                logits = matcher.processor(torch.tensor([ids], dtype=torch.long), logits)
                allowed = torch.isfinite(logits[0, : len(tokenizer)])
                if not allowed[token]:
                    options = [other for other in allowed.nonzero()[:, 0].tolist() if other != tokenizer.eos_token_id]
                    closing = [other for other in options if re.search('"|}|</parameter>', tokenizer.decode([other]))]
                    chosen = (matcher.propose(ids) or [rng.choice(closing or options)])[0]
            ids.append(chosen)
    return ids


@pytest.mark.parametrize("name", FORMATS)
def test_no_text_holds_a_call_that_breaks_its_schema(name):
    found = {masked: [] for masked in (True, False)}
    for masked, calls in found.items():
        for seed in range(25):
            text = tokenizer_of(name).decode(draw(name, seed, masked)).replace("<|think|>", "")
            calls += [event for event in read(FORMATS[name], text) if isinstance(event, Call)]
    assert all(map(fitting, found[True]))
    assert {call.name for call in found[True]} >= ({"weather", "mark"} if FORMATS[name] is LLAMA3 else {"weather", "mark", "note"})
    assert not all(map(fitting, found[False]))  # as it is without the grammar


def grouped(text: bytes, token_of: dict[bytes, int], rng: random.Random, longest: int) -> list[int]:
    """Tokens of a text, each as long as drawn, if there is one."""
    ids = []
    while text:
        size = next(
            n for n in range(min(len(text), longest if longest in (1, 99) else rng.randrange(1, longest)), 0, -1) if text[:n] in token_of
        )
        ids.append(token_of[text[:size]])
        text = text[size:]
    return ids


@pytest.mark.parametrize("name", FORMATS)
def test_where_a_text_stands_depends_on_the_text_alone(name):
    """Every grouping of its bytes into tokens: the same places, and the same tokens allowed there."""
    format, grammar = FORMATS[name], grammar_of(name)
    text = f"Well é {format.opens if format is LLAMA3 else ''}{written(format, *GOOD[: 1 if format.bare else 2])}\n\nSo"
    vocabulary = grammar.call.vocabulary
    tags = sorted((tag for tag in SPECIAL if tag in text), key=text.index)
    parts = [part for part in re.split(f"({'|'.join(map(re.escape, tags))})" if tags else "$^", text) if part]
    token_of = {vocabulary.decode_bytes([id]): id for id in range(vocabulary.vocab_size)}
    places: dict[bytes, tuple] = {}
    rng = random.Random(0)
    for trial in range(12):
        ids: list[int] = []
        for part in parts:
            ids += [token_of[part.encode()]] if part in SPECIAL else grouped(part.encode(), token_of, rng, longest=(1, 99, 9)[trial % 3])
        place, said = grammar.root, b""
        for token in ids:
            place = place.after(token)
            said += grammar.call.vocabulary.decode_bytes([token])
            if isinstance(place, Free):
                seen: tuple = ("free", place.held, place.partial, place.quiet)
            else:
                seen = ("call", place.state.allowed_V.tobytes())
            assert places.setdefault(said, seen) == seen, said
        assert said.decode() == text and isinstance(place, Free)
    assert {seen[0] for seen in places.values()} == {"free", "call"}


@pytest.mark.parametrize("name", FORMATS)
def test_a_token_that_opens_a_call_and_breaks_it_is_masked_and_no_other(name):
    """Each token of the vocabulary after each beginning of an opening, against what the text then holds."""
    format, grammar, tokenizer = FORMATS[name], grammar_of(name), tokenizer_of(name)
    opening = '{"name": "' if format is LLAMA3 else format.opens
    masked = 0
    for size in range(len(opening)):
        place = grammar.root
        for token in grammar.call.vocabulary.tokenize_bytes(opening[:size].encode()):
            place = place.after(token)
        logits = place.masked(torch.zeros(1, 400))
        refused = set(torch.isinf(logits[0]).nonzero()[:, 0].tolist())
        broken = set()
        for token in range(len(tokenizer)):
            piece = tokenizer.decode([token]) if token not in tokenizer.added_tokens_decoder else ""
            head, opens, rest = (opening[:size] + piece).partition(opening)
            if opens and rest and not any(written(format, call).startswith(head + opens + rest) for call in GOOD):
                broken.add(token)
        assert refused == broken
        masked += len(refused)
    assert masked > 0 or name in ("mistral", "mistral-args")  # no word of this tokenizer goes on after `]`


# Whole answers ---------------------------------------------------------------------------


@cache
def calling_target() -> Target:
    return wide_target(word_tokenizer(TEMPLATES["hermes"], words=PIECES, special=(END, "<tool_call>", "</tool_call>")))


def calling_law(target: Target, temperature: float, *more):
    """Of a model that likes to open calls."""
    opener = target.tokenizer.convert_tokens_to_ids("<tool_call>")

    def liking(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        liked = logits.clone()
        liked[..., opener] += 4.0
        liked[..., list(target.eos_ids)] -= 5.0
        return liked

    return make_law(temperature, logits_processors=[liking, *more])


@pytest.mark.parametrize("with_head", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_requests_of_the_engine_call_by_their_schemas(monkeypatch, tmp_path, with_head):
    """Several at once, greedy and drawn: each gets the plain loop's answer, whose calls all fit."""
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    target = calling_target()
    grammar = LazyGrammar(target.tokenizer, TOOLS[:2], HERMES, end_ids=target.eos_ids)
    law = lambda temperature, processor: calling_law(target, temperature, processor)  # noqa: E731
    calls, texts = [], 0
    for answer in answers_together(target, with_head, [grammar] * 6, law, 150):
        for event in read(HERMES, target.tokenizer.decode([token for token in answer if token not in target.eos_ids])):
            calls, texts = ([*calls, event], texts) if isinstance(event, Call) else (calls, texts + 1)
    assert len(calls) > 5 and all(map(fitting, calls)) and texts > 2


def test_a_schema_that_cannot_be_followed_is_refused():
    tokenizer = tokenizer_of("hermes")
    make = lambda strict: LazyGrammar(tokenizer, [tool("x", {"not": {}}, strict)], HERMES, end_ids=[tokenizer.eos_token_id])  # noqa: E731
    with pytest.raises(SettingError, match="parameters"):
        make(True)
    make(False)  # it is not followed


def test_tags_may_be_added_tokens_that_are_not_special():
    """As Qwen's are."""
    tokenizer = word_tokenizer(TEMPLATES["hermes"], special=(END,))
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    opens, closes = tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>"])
    grammar = LazyGrammar(tokenizer, TOOLS, HERMES, end_ids=[tokenizer.eos_token_id])
    for call, fits in ((GOOD[0], True), (BAD[0], False)):
        ids = tokenizer.encode(f"So: {written(HERMES, call)} Done.")
        assert opens in ids and closes in ids
        place, allowed = grammar.root, []
        for token in ids:
            allowed.append(bool(torch.isfinite(place.masked(torch.zeros(1, 400))[0, token])))
            place = place.after(token)
        assert all(allowed) == fits and isinstance(place, Free) == fits
    forced = Grammar.for_tools(tokenizer, TOOLS[:1], "required", HERMES, end_ids=[tokenizer.eos_token_id])
    state = forced.root
    for token in tokenizer.encode(written(HERMES, GOOD[0])):
        assert torch.isfinite(state.masked(torch.zeros(1, 400))[0, token])
        state = state.after(token)
