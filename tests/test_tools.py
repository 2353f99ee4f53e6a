"""Tool calls: the syntax of each template, and a parser that does not care how the text is cut."""

import json
import random
import re
from functools import cache
from itertools import pairwise

import pytest
import torch

from dspark.engine.grammar import Grammar
from dspark.errors import SettingError
from dspark.server.calls import Call, ToolParser
from dspark.server.syntax import DESCRIBED, HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, Format
from dspark.server.told import described, format_for
from dspark.server.xml_syntax import QWEN3_CODER
from words import END, TEMPLATES, word_tokenizer


def tool(name: str, parameters: dict | None = None) -> dict:
    return {
        "type": "function",
        "function": {"name": name, "description": f"to {name}"} | ({"parameters": parameters} if parameters else {}),
    }


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOLS = [tool("weather", CITY), tool("now"), tool("note", {"properties": {"text": {"type": "string"}, "tags": {"type": "object"}}})]
FORMATS = {format.name: format for format in (DESCRIBED, HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, QWEN3_CODER)}
SPECIAL = (END, "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]")


@cache
def tokenizer_of(name: str):
    return word_tokenizer(TEMPLATES[name], words=["tool_call", '{"name', '": "', '"}}', "call>", "\n</parameter>"], special=SPECIAL)


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
        ('{{ tools }}<function=name>{"a": 1}</function>', "Llama's custom"),
        ("{{ tools }}<tool_call>name\n<arg_key>", "GLM"),
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
    assert kept == {"described": set(), "hermes": set(), "llama3": {ids["<|python_tag|>"]}, "mistral": {ids["[TOOL_CALLS]"]}} | {
        "mistral-args": {ids["[TOOL_CALLS]"], ids["[ARGS]"]},
        "qwen3-coder": set(),
    }
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
    for city in ("Oslo", "Rome"):
        assert FORMATS[name].call("weather", {"city": city})[:-1] in text
    assert all(part in text for part in ("Be brief.", "Weather in Oslo and Rome?", "rain", "sun", "Rain and sun.", "to weather", '"city"'))
    asked = text.index("Oslo and")
    called = text.index("Oslo", asked + 1)
    assert asked < called < text.index("rain") < text.index("sun") < text.index("Rain and")
    # what the model is shown of its calls is what the parser finds in its answers
    if name in ("hermes", "described", "mistral-args", "qwen3-coder"):
        calls = [event for event in run(FORMATS[name], [text[asked : text.index("rain")]]) if isinstance(event, Call)]
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


NASTY = 'a "quoted" } { ] [ \\ </tool_call> <tool_call> [TOOL_CALLS] <|python_tag|> \n é \U0001f600'
NOTE = json.dumps({"text": NASTY, "tags": {"a": [1, {"b": "}"}]}})
OSLO, ROME = '{"city": "Oslo"}', '{"city": "Rome"}'


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def xml(name: str, **parameters: str) -> str:
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


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
    "name and arguments": (MISTRAL_ARGS, f"[TOOL_CALLS]weather[ARGS]{OSLO}", [weather(0, OSLO)]),
    "names and arguments": (
        MISTRAL_ARGS,
        f"I look. [TOOL_CALLS]weather[ARGS]{OSLO}[TOOL_CALLS]note[CALL_ID]aB3dE6gH9[ARGS] {NOTE}Done.",
        ["I look.", weather(0, OSLO), Call(1, "note", NOTE), "Done."],
    ),
    "an unknown name and arguments": (
        MISTRAL_ARGS,
        "[TOOL_CALLS]rm[ARGS]{}[TOOL_CALLS]now[ARGS]{}",
        ["[TOOL_CALLS]rm[ARGS]{}", Call(0, "now", "{}")],
    ),
    "a name alone": (MISTRAL_ARGS, "[TOOL_CALLS]now", ["[TOOL_CALLS]now"]),
    "a name without arguments": (MISTRAL_ARGS, "[TOOL_CALLS]now[ARGS]", ["[TOOL_CALLS]now[ARGS]"]),
    "a name and a list": (MISTRAL_ARGS, "[TOOL_CALLS]now[ARGS][1] [x]", ["[TOOL_CALLS]now[ARGS][1] [x]"]),
    "the older array": (MISTRAL_ARGS, '[TOOL_CALLS][{"name": "now"}]', ['[TOOL_CALLS][{"name": "now"}]']),
    "arguments cut short": (MISTRAL_ARGS, '[TOOL_CALLS]weather[ARGS]{"city', ['[TOOL_CALLS]weather[ARGS]{"city']),
    "broken arguments": (MISTRAL_ARGS, "[TOOL_CALLS]weather[ARGS]{city: 1} so", ["[TOOL_CALLS]weather[ARGS]{city: 1} so"]),
    "tags": (QWEN3_CODER, xml("weather", city="Oslo"), [weather(0, OSLO)]),
    "tags in text": (
        QWEN3_CODER,
        f"I look:\n\n{xml('weather', city='Oslo')}\n{xml('weather', city='Rome')} Done.",
        ["I look:", weather(0, OSLO), weather(1, ROME), "Done."],
    ),
    "tags close together": (
        QWEN3_CODER,
        "<tool_call><function=weather><parameter=city>Oslo</parameter></function></tool_call>",
        [weather(0, OSLO)],
    ),
    "tags without parameters": (QWEN3_CODER, xml("now"), [Call(0, "now", "{}")]),
    "a text of several lines": (QWEN3_CODER, xml("note", text="\n a\n\n"), [Call(0, "note", json.dumps({"text": "\n a\n\n"}))]),
    "tags in a value": (
        QWEN3_CODER,
        xml("note", text=f"</function>{NASTY}<parameter=x>") + xml("now"),
        [Call(0, "note", json.dumps({"text": f"</function>{NASTY}<parameter=x>"})), Call(1, "now", "{}")],
    ),
    "an object as JSON": (QWEN3_CODER, xml("note", tags='{"a": [1, true]}'), [Call(0, "note", '{"tags": {"a": [1, true]}}')]),
    "an unknown name in tags": (QWEN3_CODER, f"{xml('rm', x='1')} {xml('now')}", [xml("rm", x="1"), Call(0, "now", "{}")]),
    "no function": (QWEN3_CODER, f"<tool_call>\n{{}}</tool_call>{xml('now')}", ["<tool_call>\n{}</tool_call>", Call(0, "now", "{}")]),
    "text between parameters": (QWEN3_CODER, xml("now").replace("</f", "well </f"), [xml("now").replace("</f", "well </f")]),
    "tags cut in the last": (QWEN3_CODER, xml("weather", city="Oslo")[:-4], [weather(0, OSLO)]),
    "tags cut in a value": (QWEN3_CODER, xml("weather", city="Oslo")[:-40], [xml("weather", city="Oslo")[:-40]]),
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


PARAMETERS = {
    "type": "object",
    "$defs": {"colour": {"enum": ["red", "5", 5]}},
    "properties": {
        "text": {"type": "string", "minLength": 1},
        "count": {"type": "integer"},
        "share": {"type": "number"},
        "on": {"type": "boolean"},
        "list": {"type": "array"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "either": {"type": ["string", "integer"]},
        "colour": {"$ref": "#/$defs/colour"},
        "none": {"const": None},
        "any": {},
        "lost": {"$ref": "#/$defs/lost"},
        "round": {"$ref": "#/properties/round"},
    },
}
# parameter, its text, the value
VALUES: list[tuple[str, str, object]] = [
    ("text", "5", "5"), ("text", "null", "null"), ("text", '"a"', '"a"'), ("text", "", ""), ("text", " \t", " \t"), ("text", "\n", "\n"),
    ("count", "5", 5), ("count", " 5 ", 5), ("count", "-3", -3), ("count", "5.5", "5.5"), ("count", "five", "five"), ("count", "true", "true"),
    ("share", "5", 5), ("share", "0.5", 0.5), ("share", "NaN", "NaN"), ("share", "1e3", 1000.0),
    ("on", "true", True), ("on", "True", True), ("on", "False", False), ("on", "yes", "yes"), ("on", "1", "1"),
    ("list", '[1, "a"]', [1, "a"]), ("list", "{}", "{}"), ("list", "[1", "[1"),
    ("maybe", "null", None), ("maybe", "None", None), ("maybe", "5", "5"), ("maybe", "x", "x"),
    ("either", "5", 5), ("either", "x", "x"), ("either", "[5]", "[5]"),
    ("colour", "red", "red"), ("colour", "5", 5), ("none", "null", None),
    ("any", "5", 5), ("any", "x", "x"), ("any", '"x"', "x"), ("lost", "5", 5), ("round", "x", "x"), ("unknown", "[]", []), ("unknown", "é", "é"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "value"), VALUES)
def test_values_in_tags_are_what_the_schema_says(key, text, value):
    [call] = run(QWEN3_CODER, [xml("f", **{key: text})], [tool("f", PARAMETERS)])
    assert json.loads(call.arguments) == {key: value} and type(json.loads(call.arguments)[key]) is type(value)


@pytest.mark.parametrize(
    "schema", [{"$ref": 5}, {"type": {}}, {"type": "foo"}, {"enum": 5}, {"anyOf": 5}, [], None, {"anyOf": [{"$ref": "#/properties/x"}] * 9}]
)
def test_values_of_schemas_that_are_none_are_read_all_the_same(schema):
    [call] = run(QWEN3_CODER, [xml("f", x="5")], [tool("f", {"properties": {"x": schema}})])
    assert json.loads(call.arguments) in ({"x": 5}, {"x": "5"})


def test_a_value_beyond_numbers_is_no_call():
    assert run(QWEN3_CODER, [xml("f", share="1e999")], [tool("f", PARAMETERS)]) == [xml("f", share="1e999")]


def test_a_long_value_in_tags_is_read_once():
    parser = ToolParser(QWEN3_CODER, TOOLS)
    text = xml("note", text="</parameter" * 10_000)
    events = [event for at in range(0, len(text), 3) for event in parser.push(text[at : at + 3])]
    assert events == [Call(0, "note", json.dumps({"text": "</parameter" * 10_000}))]


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
    named = ToolParser(MISTRAL_ARGS, TOOLS)
    assert named.push("[TOOL_CALLS]he") == [] and named.push(" said") == ["[TOOL_CALLS]", "he said"]
    tags = ToolParser(QWEN3_CODER, TOOLS)
    assert tags.push("<tool_call>\n<func") == [] and tags.push("y") == ["<tool_call>", "\n<funcy"]
    assert tags.push(xml("now") + "<tool_call><function=now>\nSo") == [Call(0, "now", "{}"), "<tool_call>", "<function=now>\nSo"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_call_is_left_out_wherever_the_limit_cuts_it(name):
    format = FORMATS[name]
    before = "" if format is LLAMA3 else "Let me see.\n"
    text = before + format.text([("weather", {"city": "Oslo"})])
    closed = text.rindex(format.closes) if format.closes else len(text)  # from there on the call is whole
    for at in range(len(text) + 1):
        for pieces in ([text[:at]], list(text[:at])):
            parser, said, calls = ToolParser(format, TOOLS), "", []
            for event in [event for events in [*map(parser.push, pieces), parser.finish(cut=True)] for event in events]:
                said, calls = (said + event, calls) if isinstance(event, str) else (said, [*calls, event])
            assert said.strip() == text[: min(at, len(before))].strip(), at
            assert calls == [weather(0, OSLO)] or (at < closed and not calls), at


@pytest.mark.parametrize(
    ("format", "text"),
    [(HERMES, "a < b"), (HERMES, "<tool_box"), (HERMES, "<tool_call>now"), (LLAMA3, '{"a": {"b": 1'), (LLAMA3, "{a"), (MISTRAL, "[1, 2")],
)
def test_a_cut_text_that_begins_no_call_stays(format, text):
    parser = ToolParser(format, TOOLS)
    assert "".join([*parser.push(text), *parser.finish(cut=True)]) == text


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
        quotes = [id for id in allowed if re.search('"|}|</parameter>', tokenizer.decode([id]))]
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


def test_a_call_may_have_an_id_where_the_tokenizer_has_a_token_for_it():
    for special, allowed in ((("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), True), (("[TOOL_CALLS]", "[ARGS]"), False)):
        tokenizer = word_tokenizer(special=(END, *special))
        grammar = Grammar.for_tools(tokenizer, CLOSED, named("now"), MISTRAL_ARGS, end_ids=[256])
        assert follows(grammar, tokenizer, "[TOOL_CALLS]now[ARGS]{}")
        assert follows(grammar, tokenizer, "[TOOL_CALLS]now[CALL_ID]aB3dE6gH9[ARGS]{}") == allowed


def test_choices_that_force_nothing_are_refused():
    tokenizer = tokenizer_of("hermes")
    for choice, said in (("auto", "auto"), (named("rm"), "'rm'"), ({}, "None")):
        with pytest.raises(SettingError, match=said):
            Grammar.for_tools(tokenizer, TOOLS, choice, HERMES, end_ids=[tokenizer.eos_token_id])
    with pytest.raises(SettingError, match="parameters"):
        Grammar.for_tools(tokenizer, [tool("x", {"not": {}})], "required", HERMES, end_ids=[tokenizer.eos_token_id])


# Text that the grammar of a call to `f` holds, or not
IN_TAGS = {
    "text": ({"type": "string"}, ["", "a\nb", "</parameter", "5", '"'], []),
    "short": ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "abc", "é\n"], ["a", "abcd"]),
    "integer": ({"type": "integer", "minimum": 0}, ["0", "17"], ["-1", "x", "", "0.5"]),
    "object": ({"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": False}, ['{"a": 1}', "{}"], ['{"b": 1}']),
    "enum": ({"enum": ["red", None, 5, "a b"]}, ["red", "null", "5", "a b"], ["blue", '"red"']),
    "optional": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, ["7", "null"], ["None", "x"]),
    "reference": ({"$ref": "#/$defs/size"}, ["[1, [2]]", "[]"], ["1"]),
}


def follows(grammar: Grammar, tokenizer, text: str) -> bool:
    """Whether the whole text is one of the grammar."""
    state = grammar.root
    for id in [*tokenizer.encode(text), tokenizer.eos_token_id]:
        state = state.after(id)
    return state.intact


@pytest.mark.parametrize("name", IN_TAGS)
def test_the_grammar_of_a_value_in_tags_is_its_schema(name):
    schema, good, bad = IN_TAGS[name]
    tokenizer = tokenizer_of("qwen3-coder")
    parameters = {"$defs": {"size": {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/size"}, {"type": "integer"}]}}}}
    tools = [
        tool("f", parameters | {"properties": {"x": schema, "y": {"type": "boolean"}}, "required": ["x"], "additionalProperties": False})
    ]
    grammar = Grammar.for_tools(tokenizer, tools, "required", QWEN3_CODER, end_ids=[tokenizer.eos_token_id])
    for text in good:
        assert follows(grammar, tokenizer, xml("f", x=text)), text
        assert follows(grammar, tokenizer, xml("f", x=text, y="true") + "\n" + xml("f", x=text))
    for text in bad:
        assert not follows(grammar, tokenizer, xml("f", x=text)), text
    assert not any(
        follows(grammar, tokenizer, text) for text in (xml("f"), xml("f", y="true"), xml("f", x=good[0], z="1"), xml("g", x="1"))
    )


def test_a_function_without_declared_parameters_takes_any_in_tags():
    tokenizer = tokenizer_of("qwen3-coder")
    grammar = Grammar.for_tools(tokenizer, [tool("f", {"type": "object"})], "required", QWEN3_CODER, end_ids=[tokenizer.eos_token_id])
    assert all(follows(grammar, tokenizer, text) for text in (xml("f"), xml("f", x="a", y="b\nc")))
    assert not follows(grammar, tokenizer, xml("f", x="a").replace("=x>", "=>"))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"properties": {"x": {"type": "string", "pattern": "a+"}}}, "'pattern' of parameter 'x' of tool 'f'"),
        ({"properties": {"x>": {}}}, "'x>'"),
        ({"properties": {"x": {"enum": ["</parameter>"]}}}, "cannot be written"),
        ({"properties": {}, "oneOf": []}, "'oneOf' of the parameters of tool 'f'"),
        ({"properties": []}, "no JSON schema"),
        ({"properties": {"x": {"type": "string", "maxLength": "long"}}}, "cannot be followed"),
        ({"properties": {"x": {"$ref": "#/properties/x"}}}, "cannot be followed"),
        ({"properties": {"x": {"anyOf": [{"$ref": "#/properties/x"}] * 9}}}, "alternatives"),
        ({"properties": {"x": {"type": "foo"}}}, "foo"),
    ],
)
def test_what_tags_cannot_hold_is_refused(schema, said):
    tokenizer = tokenizer_of("qwen3-coder")
    with pytest.raises(SettingError, match=said):
        Grammar.for_tools(tokenizer, [tool("f", schema)], "required", QWEN3_CODER, end_ids=[tokenizer.eos_token_id])
