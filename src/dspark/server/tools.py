"""Tools and calls as clients send them."""

import json
import re
from collections.abc import Sequence

from dspark.errors import SettingError

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


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
