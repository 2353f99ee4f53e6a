"""Tool calls in tags, one for each parameter (Qwen3-Coder, Qwen3.5): values are bare text, so the schema says what they are."""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from dspark.errors import SettingError
from dspark.server.syntax import BROKEN, Ends, Format, as_json, holding, json_value, literal
from dspark.server.tools import NAME

VALUE_CLOSES, CALL_CLOSES = "</parameter>", "</function>"
FUNCTION = re.compile(rf"<function=({NAME.pattern})>")
PARAMETER = re.compile(r"<parameter=([^<>\n]{1,200})>")
VALUE = re.compile(rf"{PARAMETER.pattern}\n?(.*?)\n?{VALUE_CLOSES}", re.DOTALL)
TAG_BEGUN = re.compile(r"<(?:function|parameter)=[^<>\n]{0,200}")
NEWLINE, VALUE_END = literal("\n"), literal("\n" + VALUE_CLOSES)
PYTHON = {"True": "true", "False": "false", "None": "null"}  # as templates write JSON's words
# JSON type -> Python's
KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),), "array": (list,),
    "object": (dict,),
}  # fmt: skip
MAX_BRANCHES = 1000  # of a value's schema; references can multiply them without end
# What a schema may say so that a grammar can hold a call to it: of all arguments, and of a text among them.
OF_ARGUMENTS = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "title", "description"}
OF_TEXT = {"type", "minLength", "maxLength", "title", "description", "default", "examples"}


class Xml(Format):
    """`<function=NAME>`, `<parameter=KEY>`, a value, `</parameter>`, ..., `</function>`, each tag on a line of its own."""

    def call(self, name: str, arguments: dict) -> str:
        values = {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in arguments.items()}
        written = "".join(f"<parameter={key}>\n{value}\n{VALUE_CLOSES}\n" for key, value in values.items())
        return f"<function={name}>\n{written}{CALL_CLOSES}"

    def ends(self) -> Ends:
        return XmlEnd()

    def read(self, text: str, tools: Mapping[str, dict]) -> list[tuple[str, str]]:
        head = FUNCTION.match(text)
        if not head or head[1] not in tools:
            return []
        schema = tools[head[1]]
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        try:
            arguments = {key: read_value(value, properties.get(key, {}), schema) for key, value in VALUE.findall(text, head.end())}
            return [(head[1], as_json(arguments))]
        except (ValueError, RecursionError):
            return []

    def rules(self, rule: str, name: str, schema: dict, special: Mapping[str, int]) -> list[str]:
        refuse_beyond(OF_ARGUMENTS, schema, f"the parameters of tool {name!r}")
        properties, required = schema.get("properties"), schema.get("required", [])
        if not isinstance(properties, dict | None) or not isinstance(required, list):
            raise SettingError(
                f"the parameters of tool {name!r} are no JSON schema of an object", "`properties` is an object, `required` a list"
            )
        if properties is None and not required and schema.get("additionalProperties", True) is not False:  # any at all
            anything = f'("<parameter=" /[^<>\\n]{{1,64}}/ {line(">")} {rule}_any {NEWLINE})*'
            return [f"{rule}: {line(f'<function={name}>')} {anything} {literal(CALL_CLOSES)}", *text_rules(f"{rule}_any", {})]
        parameters: list[str] = []
        found: list[str] = []
        for k, (key, value) in enumerate(((properties or {}) | {key: {} for key in required if key not in (properties or {})}).items()):
            what = f"parameter {key!r} of tool {name!r}"
            if not PARAMETER.fullmatch(f"<parameter={key}>"):
                raise SettingError(f"{what} cannot be written in this model's syntax", "give it another name")
            parameters.append(f"({line(f'<parameter={key}>')} {rule}_{k} {NEWLINE}){'' if key in required else '?'}")
            found += value_rules(f"{rule}_{k}", value, schema, what)
        return [f"{rule}: {line(f'<function={name}>')} {' '.join(parameters)} {literal(CALL_CLOSES)}", *found]


class XmlEnd:
    """Of `Xml`'s calls. A value ends with the first `</parameter>`: the syntax has no way to write that within one."""

    def __init__(self) -> None:
        self.at = 0  # all before it is read
        self.named = self.inside = False  # the function's name was read; a value is being read
        self.looked = 0  # the value does not end before this

    def find(self, text: str, begin: int) -> int | None:
        self.at = max(self.at, begin)
        while True:
            if self.inside:
                end = text.find(VALUE_CLOSES, max(self.at, self.looked))
                if end < 0:
                    self.looked = max(self.at, len(text) - len(VALUE_CLOSES) + 1)
                    return None
                self.at, self.inside = end + len(VALUE_CLOSES), False
            while self.at < len(text) and text[self.at].isspace():
                self.at += 1
            if self.named and text.startswith(CALL_CLOSES, self.at):
                return self.at + len(CALL_CLOSES)
            opened = (PARAMETER if self.named else FUNCTION).match(text, self.at)
            if not opened:
                return None if self.begun(text[self.at : self.at + 250]) else BROKEN
            self.at, self.inside, self.named = opened.end(), self.named, True

    def begun(self, rest: str) -> bool:
        """Whether more text may make it one of the tags that may stand here."""
        tags = ("<parameter=", CALL_CLOSES) if self.named else ("<function=",)
        return any(tag.startswith(rest) for tag in tags) or bool(rest.startswith(tags[0]) and TAG_BEGUN.fullmatch(rest))


# Values -----------------------------------------------------------------------------------


def branches(schema: Any, root: dict, depth: int = 0) -> Iterator[dict]:
    """What a value may be, one schema of one type or constant for each possibility; references are to `root`."""
    if depth > 16:
        yield {"not": {}}  # a grammar refuses it
    elif not isinstance(schema, dict):
        yield {}
    elif "$ref" in schema:
        found: Any = root
        for step in str(schema["$ref"]).removeprefix("#").split("/")[1:]:
            found = found.get(step.replace("~1", "/").replace("~0", "~"), {}) if isinstance(found, dict) else {}
        yield from branches(without(schema, "$ref") | found if isinstance(found, dict) else {}, root, depth + 1)
    elif isinstance(several := schema.get("anyOf", schema.get("oneOf")), list):
        for one in several:
            yield from branches(without(schema, "anyOf", "oneOf") | one if isinstance(one, dict) else {}, root, depth + 1)
    elif "const" in schema or isinstance(schema.get("enum"), list):
        yield from ({"const": value} for value in ([schema["const"]] if "const" in schema else schema["enum"]))
    elif isinstance(schema.get("type"), list):
        yield from (schema | {"type": kind} for kind in schema["type"])
    else:
        yield schema


def without(schema: dict, *keys: str) -> dict:
    return {key: value for key, value in schema.items() if key not in keys}


def kind(branch: dict) -> str | None:
    """The JSON type of a branch; None for any."""
    if "const" not in branch:
        return branch["type"] if isinstance(branch.get("type"), str) else None
    return next(kind for kind, types in KINDS.items() if type(branch["const"]) in types)


def read_value(text: str, schema: Any, root: dict) -> Any:
    """A text as it is; anything else from JSON, if that gives what the schema asks for, or a text after all."""
    kinds = {kind(branch) for branch in islice(branches(schema, root), MAX_BRANCHES)}
    if kinds == {"string"}:
        return text
    try:
        value = json.loads(PYTHON.get(text.strip(), text), parse_constant=no_json)
    except ValueError:
        return text
    return value if None in kinds or any(type(value) in KINDS.get(kind or "", ()) for kind in kinds) else text


def no_json(word: str) -> None:
    raise ValueError(word)


def value_rules(rule: str, schema: Any, root: dict, what: str) -> list[str]:
    """The Lark rules of a value and the `</parameter>` after it."""
    found, options = [], []
    for k, branch in enumerate(branches(schema, root)):
        if k == MAX_BRANCHES:
            raise SettingError(f"{what} has more than {MAX_BRANCHES} alternatives", "leave some out")
        options.append(f"{rule}_{k}")
        if "const" in branch:
            value = branch["const"] if isinstance(branch["const"], str) else json.dumps(branch["const"])
            if VALUE_CLOSES in value:
                raise SettingError(f"{what} may be {value!r}, which cannot be written in this model's syntax", "leave it out")
            found.append(f"{rule}_{k}: {literal(value)} {VALUE_END}")
        elif kind(branch) == "string":
            refuse_beyond(OF_TEXT, branch, what)
            found += text_rules(f"{rule}_{k}", branch)
        else:
            named = {key: root[key] for key in ("$defs", "definitions") if key in root}
            found.append(f"{rule}_{k}: {json_value(branch | named)} {VALUE_END}")
    return [f"{rule}: {' | '.join(options)}", *found]


def line(text: str) -> str:
    return literal(text + "\n")


def text_rules(rule: str, schema: dict) -> list[str]:
    length = f"{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}"
    text = f"/(?s:.{length})/ & ~/{holding(VALUE_CLOSES)}/"
    return [f"{rule}[lazy]: {rule.upper()}", f"{rule.upper()}: ({text}) {VALUE_END}"]


def refuse_beyond(known: set[str], schema: dict, what: str) -> None:
    unknown = sorted(set(schema) - known)
    if unknown:
        raise SettingError(f"{unknown[0]!r} of {what} cannot be enforced in this model's syntax of calls", "leave it out")


QWEN3_CODER = Xml("qwen3-coder", "<tool_call>", "</tool_call>")
