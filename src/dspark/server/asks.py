"""From a client's request to what the engine is asked, one `Ask` for each answer wanted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dspark.engine.request import Request
from dspark.errors import PromptError
from dspark.generation import as_strings, check_request
from dspark.server.law import grammar_of, law_of
from dspark.server.refusal import Refusal, naming
from dspark.server.schemas import FORMATS, MAX_CHOICES, ChatRequest, CompletionRequest, Message, text_of
from dspark.target.target import Target

# Of a chat that sets no limit: runaway answers end, and no place in the cache is asked for that few answers need.
DEFAULT_CHAT_TOKENS = 4096


@dataclass(frozen=True)
class Ask:
    """One answer: the engine's request, and how its text is read. `prompt` counts the prompts of the client's request."""

    request: Request
    prompt: int = 0
    begin: str = ""  # text before the answer's (echo)
    syntax: Any = None  # of tool calls (syntax.Format), where the text may hold some
    tools: tuple[dict, ...] = ()
    one_call: bool = False  # the answer ends with its first call


def chat_asks(target: Target, body: ChatRequest, speculate: bool) -> list[Ask]:
    """Raises the `UserError` family and `Refusal`."""
    if target.tokenizer.chat_template is None:
        raise PromptError(f"{target.name or 'this target'} has no chat template, so it cannot chat", "use /v1/completions")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or () if body.tool_choice != "none"]
    messages: list[dict] = [as_dict(message) for message in body.messages]
    syntax, shown = None, None
    if tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        from dspark.server.told import described, format_for
        from dspark.server.tools import schemas

        if tools:
            with naming("tools"):
                syntax = format_for(target.tokenizer)
                schemas(tools)
        with naming("messages"):
            messages, shown = described(target.tokenizer, messages, tools or None)
    with naming("messages"):
        ids = target.prompt_ids(messages, tools=shown)
    return asks(target, body, [ids], speculate, "messages", syntax=syntax, tools=tuple(tools), one_call=body.parallel_tool_calls is False)


def completion_asks(target: Target, body: CompletionRequest, speculate: bool) -> list[Ask]:
    """Raises the `UserError` family and `Refusal`."""
    prompts: list[Any] = body.prompt if isinstance(body.prompt, list) and isinstance(body.prompt[0], str | list) else [body.prompt]
    if len(prompts) * (body.n or 1) > MAX_CHOICES:
        raise Refusal(400, f"{len(prompts)} prompts with n = {body.n or 1} are more than {MAX_CHOICES} answers", "prompt")
    ids = [target.prompt_ids(prompt, raw=True) if isinstance(prompt, str) else prompt for prompt in prompts]
    return asks(target, body, ids, speculate, "prompt", echo=bool(body.echo))


def asks(
    target: Target,
    body: ChatRequest | CompletionRequest,
    prompts: Sequence[list[int]],
    speculate: bool,
    param: str,
    echo: bool = False,
    **reading,
) -> list[Ask]:
    with naming(next((name for name in FORMATS if getattr(body, name) is not None), "tools")):
        grammar = grammar_of(body, target, reading.get("syntax"))
    predicted = body.prediction and target.tokenizer(text_of(body.prediction.content), add_special_tokens=False).input_ids
    stop = as_strings(body.stop or ())
    found: list[Ask] = []
    for number, ids in enumerate(prompts):
        limit = token_limit(target, body, len(ids), param)
        with naming(param):
            check_request(target, ids, limit, body.seed or 0, stop)
        begin = target.tokenizer.decode(ids, skip_special_tokens=True) if echo else ""
        for _ in range(body.n or 1):
            matcher = grammar and grammar.matcher(len(ids))
            request = Request(
                prompt_ids=ids,
                max_new_tokens=limit,
                law=law_of(body, len(ids), target.vocab_size, matcher and matcher.processor),
                seed=None if body.seed is None else body.seed + len(found),
                stop=stop,
                speculate=speculate,
                predicted_ids=predicted or (),
                propose=matcher and matcher.propose,
                logprobs=body.num_logprobs,
            )
            found.append(Ask(request, number, begin, **reading))
    return found


def token_limit(target: Target, body: ChatRequest | CompletionRequest, num_prompt: int, param: str) -> int:
    """Tokens the answer may have. Raises `Refusal` where prompt and answer do not fit the target's context."""
    room = target.max_context - num_prompt
    limit = min(room, DEFAULT_CHAT_TOKENS) if body.token_limit is None else body.token_limit
    if limit > room or room < 1:
        message = f"the prompt has {num_prompt} tokens, and the model's context is {target.max_context} for prompt and answer"
        if room < 1:
            raise Refusal(400, f"{message}: shorten the prompt", param, "context_length_exceeded")
        name = "max_completion_tokens" if isinstance(body, ChatRequest) and body.max_tokens is None else "max_tokens"
        unsaid = " where it is not given" if name == "max_tokens" and body.max_tokens is None else ""
        raise Refusal(400, f"{name} is {limit}{unsaid}, and at most {room} fit: {message}", name, "context_length_exceeded")
    return limit


def as_dict(message: Message) -> dict:
    """The message as chat templates take it."""
    plain: dict = {"role": "system" if message.role == "developer" else message.role, "content": text_of(message.content)}
    if message.tool_calls:
        plain["tool_calls"] = [call.model_dump(exclude={"index"}) for call in message.tool_calls]
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    return plain
