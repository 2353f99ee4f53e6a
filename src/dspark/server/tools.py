"""Tool calls: how a model writes them, how it is told of tools, and how calls are found in its text."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dspark.engine.grammar import JSON_STYLE
from dspark.errors import SettingError
from dspark.text import overlap

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# pieces of Lark
NEWLINE = r'"\n"'
MORE_ITEMS = '(", " call)*'
MORE_TAGGED = f"({NEWLINE} tagged)*"


@dataclass(frozen=True)
class Format:
    """One syntax of calls: `{"name": ..., ARGUMENTS: {...}}` between `opens` and `closes`.

    `array`: the calls of an answer are one JSON array. `bare`: a call at the very beginning needs no `opens`.
    `told`: the chat template itself tells the model of its tools."""

    name: str
    opens: str
    closes: str = ""
    arguments: str = "arguments"
    array: bool = False
    bare: bool = False
    told: bool = True

    def kept_ids(self, tokenizer) -> frozenset[int]:
        """The special tokens that are part of the syntax: text must be decoded with them."""
        added = tokenizer.added_tokens_decoder.items()
        return frozenset(id for id, token in added if token.special and token.content in (self.opens, self.closes))

    def text(self, calls: Iterable[tuple[str, dict]]) -> str:
        """Calls (name, arguments) as the model would write them."""
        written = [json.dumps({"name": name, self.arguments: arguments}, ensure_ascii=False) for name, arguments in calls]
        if self.array:
            return f"{self.opens}[{', '.join(written)}]"
        return "\n".join(call if self.bare else f"{self.opens}\n{call}\n{self.closes}" for call in written)

    def grammar(self, tools: Sequence[dict], special: Mapping[str, int], parallel: bool) -> str:
        """A Lark grammar of one call, or of several where `parallel` and the syntax allow it. `special` are the
        tokenizer's special tokens and their ids. Raises `SettingError` for a tool that cannot be called."""
        opens, closes = (f"<[{special[tag]}]>" if tag in special else json.dumps(tag) for tag in (self.opens, self.closes))
        rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
        for i, (name, schema) in enumerate(schemas(tools).items()):
            # one spelling of what surrounds the arguments, so that most of it is forced
            head = f'{{"name": "{name}", "{self.arguments}": '
            rules.append(f'call_{i}: {json.dumps(head)} %json {json.dumps({"x-guidance": JSON_STYLE} | schema)} "}}"')
        if self.array:
            start = f'{opens} " "? "[" call {MORE_ITEMS if parallel else ""} "]"'
        elif self.bare:
            start = "call"  # models with this syntax were trained on one call a turn
        else:
            rules.append(f"tagged: {opens} {NEWLINE} call {NEWLINE} {closes}")
            start = f"tagged {MORE_TAGGED if parallel else ''}"
        return "\n".join([f"start: {start}", *rules])


HERMES = Format("hermes", "<tool_call>", "</tool_call>")
LLAMA3 = Format("llama3", "<|python_tag|>", arguments="parameters", bare=True)
MISTRAL = Format("mistral", "[TOOL_CALLS]", array=True)
DESCRIBED = replace(HERMES, name="described", told=False)

# What only templates of other syntaxes hold -> their name.
UNSUPPORTED = {
    "<function=": "<function=...> (Qwen3-Coder, Llama's custom)",
    "<arg_key>": "GLM's XML",
    "[ARGS]": "Mistral's [ARGS]",
    "tool▁calls▁begin": "DeepSeek's",
    "<|channel|>": "harmony (gpt-oss)",
    "<|START_ACTION|>": "Command R's",
    "<|tool_call": "the <|tool_call|> of Phi, Granite and Kimi",
    "<start_function_call>": "FunctionGemma's",
    "<|python_start|>": "Llama 4's",
    "DSML": "DeepSeek's DSML",
    "<minimax:tool_call>": "MiniMax's XML",
}


def format_for(tokenizer) -> Format:
    """The syntax of calls that the tokenizer's chat template uses, recognised by the template's text; a described one where
    the template knows no tools. Raises `SettingError` where it is another."""
    if not tokenizer.chat_template:
        raise SettingError("this target's tokenizer has no chat template, so it cannot be told of tools", "use a model trained for chat")
    template = tokenizer.get_chat_template(tools=[{}])
    for mark, name in UNSUPPORTED.items():
        if mark in template:
            raise SettingError(f"tool calls in {name} syntax are not supported", "leave `tools` out, or use another model")
    if not re.search(r"\btools\b", template):
        return DESCRIBED
    for format, mark in ((MISTRAL, MISTRAL.opens), (HERMES, HERMES.opens), (LLAMA3, '"parameters": ')):
        if mark in template:
            return format
    raise SettingError("the syntax of this target's tool calls is not known", "leave `tools` out, or use another model")


# What the model is told ---------------------------------------------------------------


def schemas(tools: Sequence[dict]) -> dict[str, dict]:
    """name -> JSON schema of the arguments. Raises `SettingError` for a tool that is none."""
    found: dict[str, dict] = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict):
            raise SettingError("a tool is not a function", 'a tool is {"type": "function", "function": {"name": ..., "parameters": {...}}}')
        name, schema = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise SettingError(f"a tool is named {name!r}", "a name is 1 to 64 letters, digits, `_`, `-` or `.`")
        if name in found:
            raise SettingError(f"two tools are named {name!r}", "give each a name of its own")
        schema = {"properties": {}, "additionalProperties": False} if schema is None else schema
        if not isinstance(schema, dict) or schema.get("type", "object") != "object":
            raise SettingError(f"the parameters of tool {name!r} are no JSON schema of an object", 'use {"type": "object", ...}')
        found[name] = {"type": "object", **schema}
    return found


def described(tokenizer, messages: Sequence[dict], tools: Sequence[dict] | None) -> tuple[list[dict], list[dict] | None]:
    """Messages and tools in the form that the tokenizer's chat template takes.

    Without a template for tools they are described in the system message, calls and results become text, and no tools
    are left. Raises `SettingError` for what is no tool or call."""
    if not tools and not any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        return [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages], None
    format = format_for(tokenizer)
    schemas(tools or [])
    if not format.told:
        return as_text(messages, tools or [], format), None
    plain: list[dict] = []
    for message in messages:
        # templates put arguments into JSON themselves; in a string they would get there twice
        calls = [call | {"function": {"name": name, "arguments": arguments}} for call, name, arguments in calls_of(message)]
        if format is MISTRAL:  # its template wants nine letters or digits
            calls = [call | {"id": nine(call.get("id", ""))} for call in calls]
        rest = {key: value for key, value in message.items() if key != "tool_calls"} | {"content": text_of(message)}
        if format is MISTRAL and "tool_call_id" in rest:
            rest["tool_call_id"] = nine(rest["tool_call_id"])
        # Llama's template takes one call a message
        turns = [calls[k : k + 1] for k in range(len(calls))] if format is LLAMA3 else [calls] if calls else []
        plain += [rest | {"tool_calls": turn} for turn in turns] or [rest]
    return plain, list(tools) if tools else None


def as_text(messages: Sequence[dict], tools: Sequence[dict], format: Format) -> list[dict]:
    """The messages for a template that knows no tools; results of calls become turns of the user."""
    plain: list[dict] = []
    for message in messages:
        role, content = message["role"], text_of(message)
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if plain and plain[-1]["role"] == "user" and plain[-1]["content"].endswith("</tool_response>"):
                plain[-1]["content"] += f"\n{content}"
                continue
            role = "user"
        calls = [(name, arguments) for _, name, arguments in calls_of(message)]
        plain.append({"role": role, "content": "\n".join(filter(None, [content, format.text(calls) if calls else ""]))})
    if tools:
        begin = plain.pop(0)["content"] if plain and plain[0]["role"] == "system" else ""
        plain.insert(0, {"role": "system", "content": "\n\n".join(filter(None, [begin, description(tools, format)]))})
    return plain


def description(tools: Sequence[dict], format: Format) -> str:
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = f'{format.opens}\n{{"name": "NAME", "{format.arguments}": {{...}}}}\n{format.closes}'
    return (
        f"These functions can be called, one a line, with JSON schemas of their parameters:\n{listed}\n\n"
        f"To call one, answer with\n{example}\nand nothing after it. The user then sends its result between "
        "<tool_response> and </tool_response>. Call a function only where it helps; otherwise answer the user in words."
    )


def text_of(message: dict) -> str:
    """The content as one text, whether it is a text, a list of text parts, or none."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        raise SettingError(f"a {message['role']} message holds something other than text", "send text parts only")
    return "".join(part["text"] for part in content)


def calls_of(message: dict) -> list[tuple[dict, str, dict]]:
    """A message's calls: the call as sent, its name, its arguments."""
    calls = []
    for call in message.get("tool_calls") or []:
        try:
            function = call["function"]
            arguments = function.get("arguments") or {}
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            calls.append((call, str(function["name"]), dict(arguments)))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise SettingError(
                "a message has a tool call without a name, or with arguments that are no JSON object",
                'a call is {"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}',
            ) from error
    return calls


def nine(id: str) -> str:
    return hashlib.sha256(str(id).encode()).hexdigest()[:9]


# What the model says --------------------------------------------------------------------


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
    calls no tool of `tools`, stays text. White space around calls is left out."""

    BARE = re.compile(r"\s*(?:;\s*)?(?=\{)")

    def __init__(self, format: Format, tools: Sequence[dict]):
        self.format, self.names = format, frozenset(schemas(tools))
        self.buffer = ""  # not yet decided; a call may begin at its beginning if `body` is set
        self.body: int | None = None  # where in the buffer the JSON of that call is expected
        self.scan = ValueEnd()
        self.white = ""  # white space at the end of the text said so far
        self.quiet = True  # only white space was said, since the beginning or the last call
        self.num_calls = 0

    def push(self, text: str) -> list[Event]:
        """The next piece of the text; what is decided by now."""
        self.buffer += text
        return self.read(final=False)

    def finish(self) -> list[Event]:
        """The text is over; the rest of the events. A last call may lack its closing tag."""
        events = self.read(final=True)
        if self.white and not (self.quiet and self.num_calls):
            events.append(self.white)
        self.white = ""
        return events

    def read(self, final: bool) -> list[Event]:
        events: list[Event] = []
        while self.buffer:
            if self.body is None:
                found = self.opening()
                self.say(events, found[0] if found else len(self.buffer) - (0 if final else self.undecided()))
                if not found:
                    break
                self.body, self.scan = found[1] - found[0], ValueEnd()
            outcome = self.judge(final)
            if outcome is None:
                if final:  # a call cut short, with all that its strings hold
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

    def opening(self) -> tuple[int, int] | None:
        """Where in the buffer a call may begin, and where its JSON does."""
        bare = self.BARE.match(self.buffer) if self.format.bare and self.quiet else None
        if bare:
            return 0, bare.end()
        begin = self.buffer.find(self.format.opens)
        return None if begin < 0 else (begin, begin + len(self.format.opens))

    def undecided(self) -> int:
        """How many characters at the end of the buffer may turn out to begin a call."""
        if self.format.bare and self.quiet and re.fullmatch(r"\s*(?:;\s*)?", self.buffer):
            return len(self.buffer)
        return overlap(self.buffer, self.format.opens)

    def judge(self, final: bool) -> tuple[list[tuple[str, str]], int] | None:
        """The calls at the beginning of the buffer (none: it is text) and where they end; None: not decided yet."""
        assert self.body is not None
        begin = len(self.buffer) - len(self.buffer[self.body :].lstrip())
        if begin == len(self.buffer):
            return None
        if self.buffer[begin] != ("[" if self.format.array else "{"):
            return [], max(self.body, 1)
        end = self.scan.find(self.buffer, begin)
        if end is None:
            return None
        calls = read_calls(self.buffer[begin:end], self.names)
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


class ValueEnd:
    """Finds where a JSON object or array ends, looking at each character once however often it is asked."""

    def __init__(self) -> None:
        self.at, self.depth, self.quoted, self.escaped = 0, 0, False, False

    def find(self, text: str, begin: int) -> int | None:
        """The index after the value that begins at `begin`; None if `text`, which only grows, does not hold it all yet."""
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


def read_calls(text: str, names: Collection[str]) -> list[tuple[str, str]]:
    """(name, arguments as JSON) of a call or an array of them; none if any of it is not a call of a known tool."""
    try:
        record = json.loads(text)
        calls = []
        for call in record if isinstance(record, list) else [record]:
            arguments = call.get("arguments", call.get("parameters", {}))
            if call.get("name") not in names or not isinstance(arguments, dict):
                return []
            # numbers beyond a float's range would be written as Infinity, which is not JSON
            calls.append((call["name"], json.dumps(arguments, allow_nan=False)))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return []
    return calls
