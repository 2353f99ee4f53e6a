"""Prompts files: one JSON object a line, `{"prompt": "..."}` or `{"messages": [...]}`; other keys are kept."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark.errors import PromptError, UserError

A_LINE = 'a line is one object: {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
ROLES = ("system", "developer", "user", "assistant", "tool")  # developer is taken as system: few chat templates know it


@dataclass(frozen=True)
class Prompt:
    """One user turn (`str`) or a chat (list of messages), and whatever else its line carried."""

    content: str | list[dict]
    extra: dict = field(default_factory=dict)


def read_prompts(path: str | Path) -> list[Prompt]:
    """All prompts of a file. Raises `PromptError` naming the line that cannot be used."""
    try:
        # not splitlines: JSON strings may hold U+2028 and its like as they are
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise PromptError(f"cannot read prompts file {path}: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"prompts file {path} is not UTF-8 text (byte {error.start})", "save it in UTF-8") from error
    prompts = [parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise PromptError(f"prompts file {path} holds no prompt", A_LINE)
    return prompts


def read_json(path: Path, kind: type[UserError], hint: str) -> Any:
    """The value in a JSON file. Raises `kind` when it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise kind(f"cannot read {path}: {error.strerror}", hint) from error
    return parse_json(data, str(path), kind, hint)


def parse_json(data: str | bytes, where: str, kind: type[UserError], hint: str) -> Any:
    """The value of a JSON text that may be damaged. Raises `kind` saying where and why."""
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        raise kind(f"{where}: not JSON ({error.msg} at character {error.pos + 1})", hint) from error
    except RecursionError as error:
        raise kind(f"{where}: nested too deeply", hint) from error
    except ValueError as error:  # bytes that are no text, or a number of thousands of digits
        raise kind(f"{where}: not JSON ({error})", hint) from error


def parse(line: str, where: str) -> Prompt:
    record = parse_json(line, where, PromptError, A_LINE)
    if any("\ud800" <= character <= "\udfff" for character in json.dumps(record, ensure_ascii=False)):
        raise PromptError(f"{where}: holds half of a surrogate pair, which is no character", "write the character itself, or both halves")
    if not isinstance(record, dict):
        raise PromptError(f"{where}: expected an object, found {type(record).__name__}", A_LINE)
    extra = {key: value for key, value in record.items() if key not in ("prompt", "messages")}
    text, messages = record.get("prompt"), record.get("messages")
    if (text is None) == (messages is None):
        raise PromptError(f"{where}: give either `prompt` or `messages`", A_LINE)
    if messages is None:
        if not isinstance(text, str) or not text:
            raise PromptError(f"{where}: `prompt` must be a text that is not empty", A_LINE)
        return Prompt(text, extra)
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages)
    ):
        raise PromptError(f"{where}: `messages` must be a list of objects with `role` and `content`", A_LINE)
    for number, message in enumerate(messages, 1):
        if message["role"] not in ROLES:
            raise PromptError(
                f"{where}: message {number} has the role {message['role']!r}", f"a role is {', '.join(ROLES[:-1])} or {ROLES[-1]}"
            )
    return Prompt([m | {"role": "system"} if m["role"] == "developer" else m for m in messages], extra)
