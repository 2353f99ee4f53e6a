"""From a request's settings to the law its tokens are drawn from.

Every processor here is a function of the tokens before a row and its logits, so each verified row gets its own."""

from typing import Any

import torch

from dspark.core.sampling import Law, Processor
from dspark.errors import SettingError
from dspark.generation import make_law
from dspark.server.schemas import ChatRequest, JsonObjectFormat, JsonSchemaFormat, Sampling
from dspark.target.target import Target


def law_of(body: Sampling, num_prompt: int, vocab_size: int, mask: Processor | None = None) -> Law:
    """The law of an answer to a prompt of `num_prompt` tokens; `mask` is a grammar's. Raises `SettingError`."""
    processors: list[Any] = []
    if body.presence_penalty or body.frequency_penalty:
        processors.append(Penalties(num_prompt, body.presence_penalty or 0.0, body.frequency_penalty or 0.0))
    if body.logit_bias:
        processors.append(Bias({int(token): bias for token, bias in body.logit_bias.items()}, vocab_size))
    if mask is not None:  # last: no bias brings back what the grammar forbids
        processors.append(mask)
    return make_law(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logits_processors=processors,
    )


class Penalties:
    """OpenAI's presence and frequency penalty: a token's logit loses `presence` once it is in the answer, and `frequency`
    for each time. The prompt's `num_prompt` tokens do not count."""

    def __init__(self, num_prompt: int, presence: float, frequency: float):
        self.num_prompt, self.presence, self.frequency = num_prompt, presence, frequency

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        tokens, counts = ids[0, self.num_prompt :].unique(return_counts=True)
        penalised = logits.clone()
        penalised[0, tokens] -= self.presence + self.frequency * counts.to(logits.dtype)
        return penalised


class Bias:
    """OpenAI's logit_bias: token id -> added to its logit. Raises `SettingError` for an id that is none."""

    def __init__(self, bias: dict[int, float], vocab_size: int):
        outside = [token for token in bias if token >= vocab_size]
        if outside:
            raise SettingError(f"logit_bias names token {outside[0]}, outside the target's vocabulary of {vocab_size}")
        self.tokens, self.bias = torch.tensor(list(bias)), torch.tensor(list(bias.values()))

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        tokens, bias = self.tokens.to(logits.device), self.bias.to(logits)
        return logits.index_add(-1, tokens, bias[None])


def grammar_of(body: Sampling, target: Target, syntax: Any = None) -> Any | None:
    """The grammar that every answer must follow (`dspark.engine.grammar.Grammar`; `LazyGrammar` where the model may call
    `strict` functions), None for none; `syntax` is that of the target's tool calls. Raises `SettingError` for one that
    cannot be followed."""
    tools = body.tools if isinstance(body, ChatRequest) else None
    choice = body.tool_choice if isinstance(body, ChatRequest) else None
    forced = tools and choice not in (None, "auto", "none")
    strict = choice in (None, "auto") and any(tool.function.strict for tool in tools or ())
    form = body.response_format
    if not (forced or strict or isinstance(form, JsonObjectFormat | JsonSchemaFormat) or body.guided_regex or body.guided_grammar):
        return None
    try:
        from dspark.engine.grammar import Grammar
        from dspark.engine.lazy import LazyGrammar
    except ImportError as error:
        raise SettingError(
            "this server cannot follow grammars: llguidance is not installed", "pip install 'dspark[serve]', in a checkout '.[serve]'"
        ) from error
    tokenizer, end_ids = target.tokenizer, target.eos_ids
    described = [tool.model_dump(exclude_none=True) for tool in tools or ()]
    if strict:
        return LazyGrammar(tokenizer, described, syntax, end_ids=end_ids)
    if forced:
        assert isinstance(body, ChatRequest)
        named = choice if isinstance(choice, str) else choice.model_dump()  # type: ignore[union-attr]
        return Grammar.for_tools(tokenizer, described, named, syntax, end_ids=end_ids, parallel=body.parallel_tool_calls is not False)
    if isinstance(form, JsonSchemaFormat):
        return Grammar.from_json_schema(tokenizer, form.json_schema.schema_, end_ids=end_ids)
    if isinstance(form, JsonObjectFormat):
        return Grammar.json_object(tokenizer, end_ids=end_ids)
    if body.guided_regex:
        return Grammar.from_regex(tokenizer, body.guided_regex, end_ids=end_ids)
    return Grammar.from_lark(tokenizer, body.guided_grammar or "", end_ids=end_ids)
