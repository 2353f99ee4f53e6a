"""Tool calls: the syntax of each template, and a parser that does not care how the text is cut."""

import json
import random
from functools import cache
from itertools import pairwise

import pytest
import torch

from dspark.engine.grammar import Grammar
from dspark.errors import SettingError
from dspark.server.tools import DESCRIBED, HERMES, LLAMA3, MISTRAL, Call, Format, ToolParser, described, format_for
from words import END, TEMPLATES, word_tokenizer


def tool(name: str, parameters: dict | None = None) -> dict:
    return {
        "type": "function",
        "function": {"name": name, "description": f"to {name}"} | ({"parameters": parameters} if parameters else {}),
    }


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOLS = [tool("weather", CITY), tool("now"), tool("note", {"properties": {"text": {"type": "string"}, "tags": {"type": "object"}}})]
FORMATS = {format.name: format for format in (DESCRIBED, HERMES, LLAMA3, MISTRAL)}
SPECIAL = (END, "<|python_tag|>", "[TOOL_CALLS]")


@cache
def tokenizer_of(name: str):
    return word_tokenizer(TEMPLATES[name], words=["tool_call", '{"name', '": "', '"}}', "call>"], special=SPECIAL)


def named(name: str) -> dict:
    return {"type": "function", "function": {"name": name}}


# Formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_syntax_is_recognised_by_the_template(name):
    assert format_for(tokenizer_of(name)) is FORMATS[name]


def test_a_template_for_tools_among_several_is_the_one_that_counts():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATES["described"], "tool_use": TEMPLATES["hermes"]}
    assert format_for(tokenizer) is HERMES


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ tools }}<tool_call>\n<function=name>", "Qwen3-Coder"),
        ("{{ tools }}<tool_call>name\n<arg_key>", "GLM"),
        ("{{ tools }}[TOOL_CALLS]name[ARGS]{}", r"\[ARGS\]"),
        ("{{ tools }}<|channel|>commentary", "gpt-oss"),
        ("{{ tools }}<｜tool▁calls▁begin｜>", "DeepSeek"),
        ("{{ tools }}<|tool_call|>", "Phi"),
        ("{{ tools }}", "not known"),
        (None, "no chat template"),
    ],
)
def test_another_syntax_is_refused_by_name(template, named):
    with pytest.raises(SettingError, match=named):
        format_for(word_tokenizer(template))


def test_special_tokens_of_the_syntax_are_kept():
    ids = {text: 256 + i for i, text in enumerate(SPECIAL)}
    tokenizer = word_tokenizer(special=SPECIAL)
    kept = {name: format.kept_ids(tokenizer) for name, format in FORMATS.items()}
    assert kept == {"described": set(), "hermes": set(), "llama3": {ids["<|python_tag|>"]}, "mistral": {ids["[TOOL_CALLS]"]}}
    special = word_tokenizer(special=(END, "<tool_call>", "</tool_call>"))
    assert HERMES.kept_ids(special) == {257, 258}


# Messages --------------------------------------------------------------------------------

SENT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather in "}, {"type": "text", "text": "Oslo and Rome?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": f"call_{i}", "type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
            for i, city in enumerate(["Oslo", "Rome"])
        ],
    },
    {"role": "tool", "tool_call_id": "call_0", "content": "rain"},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sun"}]},
    {"role": "assistant", "content": "Rain and sun."},
]


def rendered(name: str, messages=SENT, tools=TOOLS) -> str:
    tokenizer = tokenizer_of(name)
    messages, tools = described(tokenizer, messages, tools)
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)


@pytest.mark.parametrize("name", FORMATS)
def test_templates_take_calls_and_results(name):
    text = rendered(name)
    key = FORMATS[name].arguments
    for city in ("Oslo", "Rome"):
        assert f'{{"name": "weather", "{key}": {{"city": "{city}"}}' in text
    assert all(part in text for part in ("Be brief.", "Weather in Oslo and Rome?", "rain", "sun", "Rain and sun.", "to weather", '"city"'))
    assert text.index("Oslo and") < text.index('{"city": "Oslo"}') < text.index("rain") < text.index("sun") < text.index("Rain and")
    # what the model is shown of its calls is what the parser finds in its answers
    written = "".join(text[text.index('{"city": "Oslo"}') - 100 : text.index("rain")]) if name != "mistral" else ""
    if name in ("hermes", "described"):
        calls = [event for event in run(FORMATS[name], [written]) if isinstance(event, Call)]
        assert [json.loads(call.arguments)["city"] for call in calls] == ["Oslo", "Rome"]


def test_described_tools_join_the_system_message():
    tokenizer = tokenizer_of("described")
    messages, tools = described(tokenizer, SENT, TOOLS)
    assert tools is None and [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0]["content"].startswith("Be brief.\n\n") and "<tool_call>" in messages[0]["content"]
    assert messages[3]["content"] == "<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>"
    alone, _ = described(tokenizer, SENT[1:2], TOOLS)
    assert [m["role"] for m in alone] == ["system", "user"] and all(json.dumps(t["function"]) in alone[0]["content"] for t in TOOLS)
    without_tools, _ = described(tokenizer, SENT, None)
    assert without_tools[0]["content"] == "Be brief." and "<tool_call>" in without_tools[2]["content"]
    untouched = [{"role": "user", "content": "Hi."}]
    assert described(word_tokenizer("{{ tools }}"), untouched, None) == (untouched, None)
    # some templates take the key alone for a call
    assert described(word_tokenizer("{{ tools }}"), [untouched[0] | {"tool_calls": None}], []) == (untouched, None)


def test_messages_sent_are_left_as_they_were():
    before = json.dumps(SENT)
    for name in FORMATS:
        rendered(name)
    assert json.dumps(SENT) == before


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"function": {"name": "now", "arguments": "{"}}, "no JSON object"),
        ({"function": {}}, "name"),
        ({"function": {"name": "now", "arguments": "[1]"}}, "no JSON"),
    ],
)
def test_broken_calls_in_messages_are_refused(call, said):
    with pytest.raises(SettingError, match=said):
        rendered("hermes", [{"role": "assistant", "content": "", "tool_calls": [call]}])


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ([{"type": "retrieval"}], "not a function"),
        ([tool("a b")], "'a b'"),
        ([tool("now"), tool("now")], "two tools"),
        ([tool("now", {"type": "string"})], "schema of an object"),
        (["now"], "not a function"),
    ],
)
def test_broken_tools_are_refused(tools, said):
    with pytest.raises(SettingError, match=said):
        described(tokenizer_of("hermes"), SENT[:1], tools)


# The parser ------------------------------------------------------------------------------


def run(format: Format, pieces, tools=TOOLS) -> list:
    """All events, adjoining texts joined."""
    parser, joined = ToolParser(format, tools), []
    for events in [*map(parser.push, pieces), parser.finish()]:
        for event in events:
            assert event != ""
            if isinstance(event, str) and joined and isinstance(joined[-1], str):
                joined[-1] += event
            else:
                joined.append(event)
    return joined


NASTY = 'a "quoted" } { ] [ \\ </tool_call> <tool_call> [TOOL_CALLS] <|python_tag|> \n é \ud83d\ude00'
NOTE = json.dumps({"text": NASTY, "tags": {"a": [1, {"b": "}"}]}})
OSLO, ROME = '{"city": "Oslo"}', '{"city": "Rome"}'


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def weather(index: int, city: str) -> Call:
    return Call(index, "weather", city)


# format, text, events
TEXTS = {
    "text": (HERMES, "Hello <b>there</b> {x} <tool", ["Hello <b>there</b> {x} <tool"]),
    "white space": (HERMES, "  Hello \n ", ["  Hello \n "]),
    "call": (HERMES, hermes("weather", OSLO), [weather(0, OSLO)]),
    "call in text": (HERMES, f"I look:\n\n{hermes('weather', OSLO)}\n\nDone. ", ["I look:", weather(0, OSLO), "Done. "]),
    "calls": (HERMES, "\n".join([hermes("weather", OSLO), hermes("weather", ROME)]), [weather(0, OSLO), weather(1, ROME)]),
    "close together": (HERMES, hermes("weather", OSLO) + "and" + hermes("now", "{}"), [weather(0, OSLO), "and", Call(1, "now", "{}")]),
    "no white space": (HERMES, '<tool_call>{"name":"weather","arguments":{"city":"Oslo"}}</tool_call>', [weather(0, OSLO)]),
    "no arguments": (HERMES, '<tool_call>{"name": "now"}</tool_call>', [Call(0, "now", "{}")]),
    "nasty strings": (HERMES, hermes("note", NOTE) + hermes("now", "{}"), [Call(0, "note", NOTE), Call(1, "now", "{}")]),
    "unknown name": (HERMES, f"{hermes('rm', OSLO)} {hermes('now', '{}')}", [hermes("rm", OSLO), Call(0, "now", "{}")]),
    "unknown name around a call": (
        HERMES,
        hermes("rm", json.dumps({"x": hermes("now", "{}")})),
        [hermes("rm", json.dumps({"x": hermes("now", "{}")}))],
    ),
    "broken JSON": (HERMES, hermes("weather", '{"city": Oslo}'), [hermes("weather", '{"city": Oslo}')]),
    "not an object": (HERMES, hermes("weather", '["Oslo"]'), [hermes("weather", '["Oslo"]')]),
    "not JSON": (HERMES, f"<tool_call>weather</tool_call>{hermes('now', '{}')}", ["<tool_call>weather</tool_call>", Call(0, "now", "{}")]),
    "infinite": (HERMES, hermes("note", '{"tags": {"x": 1e999}}'), [hermes("note", '{"tags": {"x": 1e999}}')]),
    "two in one tag": (
        HERMES,
        '<tool_call>{"name": "now"} {"name": "now"}</tool_call>',
        ['<tool_call>{"name": "now"} {"name": "now"}</tool_call>'],
    ),
    "cut in the tag": (HERMES, hermes("weather", OSLO)[:-4], [weather(0, OSLO)]),
    "no closing tag": (HERMES, f'<tool_call>\n{{"name": "weather", "arguments": {OSLO}}}\n', [weather(0, OSLO)]),
    "cut in a string": (
        HERMES,
        hermes("note", json.dumps({"text": hermes("now", "{}")}))[:-20],
        [hermes("note", json.dumps({"text": hermes("now", "{}")}))[:-20]],
    ),
    "twice begun": (HERMES, f"<tool_call>\n{hermes('now', '{}')}", ["<tool_call>", Call(0, "now", "{}")]),
    "deep": (HERMES, "<tool_call>" + '{"name": "now", "arguments": ' + '{"a":' * 3000 + "1" + "}" * 3001 + "</tool_call>", None),
    "bare": (LLAMA3, f' {{"name": "weather", "parameters": {OSLO}}}', [weather(0, OSLO)]),
    "bare calls": (
        LLAMA3,
        f'{{"name": "weather", "parameters": {OSLO}}}; {{"name": "weather", "parameters": {ROME}}}',
        [weather(0, OSLO), weather(1, ROME)],
    ),
    "bare and text": (LLAMA3, '{"name": "now", "parameters": {}} ;-) ', [Call(0, "now", "{}"), ";-) "]),
    "python tag": (LLAMA3, f'<|python_tag|>{{"name": "note", "parameters": {NOTE}}}', [Call(0, "note", NOTE)]),
    "tag in text": (LLAMA3, 'So: <|python_tag|>{"name": "now", "parameters": {}}', ["So:", Call(0, "now", "{}")]),
    "braces in text": (LLAMA3, 'In C: {"name": "now", "parameters": {}}', ['In C: {"name": "now", "parameters": {}}']),
    "bare JSON that is no call": (LLAMA3, '{"a": {}} {"name": "now"}', ['{"a": {}} {"name": "now"}']),
    "builtin": (LLAMA3, '<|python_tag|>search.call(query="x")', ['<|python_tag|>search.call(query="x")']),
    "array": (MISTRAL, f'[TOOL_CALLS] [{{"name": "weather", "arguments": {OSLO}}}]', [weather(0, OSLO)]),
    "array of two": (
        MISTRAL,
        f'Well. [TOOL_CALLS][{{"name": "note", "arguments": {NOTE}}}, {{"name": "now", "arguments": {{}}}}] ',
        ["Well.", Call(0, "note", NOTE), Call(1, "now", "{}")],
    ),
    "array with an unknown name": (
        MISTRAL,
        '[TOOL_CALLS][{"name": "now"}, {"name": "rm"}]',
        ['[TOOL_CALLS][{"name": "now"}, {"name": "rm"}]'],
    ),
    "empty array": (MISTRAL, "[TOOL_CALLS][]", ["[TOOL_CALLS][]"]),
    "array that is none": (MISTRAL, '[TOOL_CALLS]{"name": "now"}', ['[TOOL_CALLS]{"name": "now"}']),
    "nothing": (HERMES, "", []),
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_cut_gives_the_same_events(name):
    format, text, expected = TEXTS[name]
    expected = [text] if expected is None else expected
    assert run(format, [text]) == expected
    for at in range(len(text) + 1) if len(text) < 1000 else (1, 5000, len(text) - 5):
        assert run(format, [text[:at], text[at:]]) == expected, at
    assert run(format, list(text)) == expected
    rng = random.Random(0)
    for _ in range(200 if len(text) < 1000 else 3):
        cuts = sorted({0, len(text), *(rng.randrange(len(text) + 1) for _ in range(rng.randrange(12)))})
        assert run(format, [text[a:b] for a, b in pairwise(cuts)]) == expected, cuts


@pytest.mark.parametrize("name", [name for name, (_, text, _) in TEXTS.items() if len(text) < 1000])
def test_every_number_of_tokens_a_step_gives_the_same_events(name):
    format, text, expected = TEXTS[name]
    tokenizer = tokenizer_of(format.name)
    ids = tokenizer.encode(text)
    for step in range(1, 9):
        ends = [*range(step, len(ids), step), len(ids)]
        # a character may be cut: as in streaming, text goes out once it is whole
        texts = ["", *(tokenizer.decode(ids[:end]).rstrip("\ufffd") for end in ends)]
        assert run(format, [b[len(a) :] for a, b in pairwise(texts)]) == expected, step


def test_text_and_calls_go_out_as_soon_as_they_are_decided():
    parser = ToolParser(HERMES, TOOLS)
    assert parser.push("Let me <b>look") == ["Let me <b>look"]
    assert parser.push(" <tool_") == []
    assert parser.push("box>") == [" <tool_box>"]
    assert parser.push(hermes("weather", OSLO)[:-1]) == []
    assert parser.push(">") == [weather(0, OSLO)]
    assert parser.push("<tool_call>No") == ["<tool_call>", "No"]
    assert parser.finish() == []
    bare = ToolParser(LLAMA3, TOOLS)
    assert bare.push("An {") == ["An {"]


def test_a_long_call_is_read_once():
    """20,000 pieces of a string with braces: a parser that began anew each time would take minutes."""
    parser = ToolParser(HERMES, TOOLS)
    text = hermes("note", json.dumps({"text": "{}" * 20_000}))
    events = [event for at in range(0, len(text), 2) for event in parser.push(text[at : at + 2])]
    assert events == [Call(0, "note", json.dumps({"text": "{}" * 20_000}))]


# Grammars of calls -----------------------------------------------------------------------


def random_answer(grammar: Grammar, tokenizer, seed: int, limit: int = 400) -> list[int] | None:
    """Tokens drawn from those that the grammar allows, without the end; None if it did not come within `limit`."""
    rng, matcher, ids = random.Random(seed), grammar.matcher(0), []
    while len(ids) < limit:
        masked = matcher.processor(torch.tensor([ids], dtype=torch.long), torch.zeros(1, len(tokenizer)))
        allowed = torch.isfinite(masked[0]).nonzero()[:, 0].tolist()
        quotes = [id for id in allowed if '"' in tokenizer.decode([id]) or "}" in tokenizer.decode([id])]
        forced = matcher.propose(ids)
        ids.append(forced[0] if forced else rng.choice(quotes if quotes and rng.random() < 0.5 else allowed))
        if ids[-1] == tokenizer.eos_token_id:
            return ids[:-1]
    return None


CLOSED = [tool("weather", CITY), tool("now"), tool("mark", {"properties": {"n": {"enum": [1, 2]}}, "additionalProperties": False})]


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_grammar_allows_is_what_the_parser_reads(name):
    format, tokenizer = FORMATS[name], tokenizer_of(name)
    found: list[list[Call]] = []
    grammar = Grammar.for_tools(tokenizer, CLOSED, "required", format, end_ids=[tokenizer.eos_token_id])
    for seed in range(25):
        ids = random_answer(grammar, tokenizer, seed)
        if ids is not None:
            events = run(format, [tokenizer.decode(ids)], CLOSED)
            assert events and all(isinstance(event, Call) for event in events), tokenizer.decode(ids)
            found.append(events)
    assert len(found) > 15
    assert {call.name for calls in found for call in calls} == {"weather", "now", "mark"}
    assert max(map(len, found)) > 1 or format is LLAMA3


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_tool_is_called_once(name):
    format, tokenizer = FORMATS[name], tokenizer_of(name)
    for tools, choice, parallel in ((CLOSED, named("now"), True), (CLOSED[1:2], "required", False)):
        grammar = Grammar.for_tools(tokenizer, tools, choice, format, end_ids=[tokenizer.eos_token_id], parallel=parallel)
        for seed in range(5):
            ids = random_answer(grammar, tokenizer, seed)
            assert [call.name for call in run(format, [tokenizer.decode(ids)], CLOSED)] == ["now"]


def test_special_tokens_of_the_syntax_are_tokens_in_its_grammar():
    tokenizer = word_tokenizer(special=(END, "<tool_call>", "</tool_call>"))
    grammar = Grammar.for_tools(tokenizer, CLOSED, named("now"), HERMES, end_ids=[256])
    ids = random_answer(grammar, tokenizer, 0)
    assert ids[0] == 257 and ids[-1] == 258 and run(HERMES, [tokenizer.decode(ids)], CLOSED) == [Call(0, "now", "{}")]


def test_choices_that_force_nothing_are_refused():
    tokenizer = tokenizer_of("hermes")
    for choice, said in (("auto", "auto"), (named("rm"), "'rm'"), ({}, "None")):
        with pytest.raises(SettingError, match=said):
            Grammar.for_tools(tokenizer, TOOLS, choice, HERMES, end_ids=[tokenizer.eos_token_id])
    with pytest.raises(SettingError, match="parameters"):
        Grammar.for_tools(tokenizer, [tool("x", {"not": {}})], "required", HERMES, end_ids=[tokenizer.eos_token_id])
