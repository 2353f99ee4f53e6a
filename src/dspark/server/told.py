"""What a model is told of tools and of calls made, in the form that its chat template takes."""

import hashlib
import json
import re
from collections.abc import Sequence

from dspark.errors import SettingError
from dspark.server.syntax import DESCRIBED, HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, Format
from dspark.server.tools import calls_of, schemas, text_of
from dspark.server.xml_syntax import QWEN3_CODER

# What a template holds -> the syntax it means. The first that fits counts.
MARKS: tuple[tuple[Format, tuple[str, ...]], ...] = (
    (QWEN3_CODER, ("<tool_call>", "<function=", "<parameter=")),
    (MISTRAL_ARGS, (MISTRAL_ARGS.opens, "[ARGS]")),
    (MISTRAL, (MISTRAL.opens,)),
    (HERMES, (HERMES.opens,)),
    (LLAMA3, ('"parameters": ',)),
)
# What only templates of other syntaxes hold -> their name.
UNSUPPORTED = {
    "<function=": "Llama's custom <function=...>",
    "<arg_key>": "GLM's XML",
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
    if all(mark in template for mark in MARKS[0][1]):  # before it is refused for the mark that it shares
        return QWEN3_CODER
    for mark, name in UNSUPPORTED.items():
        if mark in template:
            raise SettingError(f"tool calls in {name} syntax are not supported", "leave `tools` out, or use another model")
    if not re.search(r"\btools\b", template):
        return DESCRIBED
    for format, marks in MARKS:
        if all(mark in template for mark in marks):
            return format
    raise SettingError("the syntax of this target's tool calls is not known", "leave `tools` out, or use another model")


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
        if format in (MISTRAL, MISTRAL_ARGS):  # their templates want nine letters or digits
            calls = [call | {"id": nine(call.get("id", ""))} for call in calls]
        rest = {key: value for key, value in message.items() if key != "tool_calls"} | {"content": text_of(message)}
        if format in (MISTRAL, MISTRAL_ARGS) and "tool_call_id" in rest:
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


def nine(id: str) -> str:
    return hashlib.sha256(str(id).encode()).hexdigest()[:9]
