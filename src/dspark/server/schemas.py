"""What clients may send, and the shape of what they get: OpenAI's API as far as it is honoured.

A field that is not here is refused, and so is a value that could not take effect; errors raised here are of the type of the field meant. Fields marked "ignored" do not change the
answer in OpenAI's API either. null means: not given."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 64  # prompts times n of one HTTP request
MAX_SEED = 2**61 - 1 - MAX_CHOICES  # choice i has seed + i
MAX_STOPS, MAX_STOP_LENGTH = 16, 500


class Fields(BaseModel):
    """Strict: no other fields, no conversion between types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# ---- messages


class TextPart(Fields):
    type: Literal["text"]
    text: str


def refuse_other_parts(content: Any) -> Any:
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
            raise PydanticCustomError("part", "content of type {kind} is not supported: the model reads text only", {"kind": part["type"]})
    return content


Content = Annotated[str | list[TextPart], BeforeValidator(refuse_other_parts)]


class FunctionCall(Fields):
    name: str
    arguments: Annotated[str, Field(description="JSON")]


class ToolCall(Fields):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Annotated[int | None, Field(description="ignored: clients that pass back streamed calls send it")] = None


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Annotated[str | None, Field(description="ignored: chat templates have no place for it")] = None
    tool_calls: Annotated[list[ToolCall] | None, Field(description="of the assistant")] = None
    tool_call_id: Annotated[str | None, Field(description="of a tool's result")] = None
    # what clients pass back when they append an answer as they got it
    refusal: None = None
    annotations: Annotated[list[None] | None, Field(max_length=0)] = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def fits_its_role(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError("content", "a message of role {role} needs content", {"role": self.role})
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only the assistant has tool_calls, not {role}", {"role": self.role})
        if self.role == "tool" and not self.tool_call_id:
            raise PydanticCustomError("tool_call_id", "a tool message needs the tool_call_id that it answers")
        return self


def text_of(content: str | list[TextPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


# ---- what constrains an answer


class TextFormat(Fields):
    type: Literal["text"]


class JsonObjectFormat(Fields):
    type: Literal["json_object"]


class JsonSchema(Fields):
    model_config = ConfigDict(serialize_by_alias=True)

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: Annotated[bool | None, Field(description="ignored: every schema is enforced")] = None


class JsonSchemaFormat(Fields):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Fields):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[
        bool | None, Field(description="calls always follow the schema, also where the model may choose (tool_choice auto)")
    ] = None


class Tool(Fields):
    type: Literal["function"]
    function: Function


class NamedFunction(Fields):
    name: str


class NamedTool(Fields):
    type: Literal["function"]
    function: NamedFunction


class Prediction(Fields):
    type: Literal["content"]
    content: Content


# ---- requests


class StreamOptions(Fields):
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, Field(description="ignored: nothing is padded")] = None


class Extras(Fields):
    sources: Annotated[bool, Field(description="streamed chunks tell how each token came")] = False


def whole_stops(stop: str | list[str]) -> str | list[str]:
    for text in [stop] if isinstance(stop, str) else stop:
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise PydanticCustomError("stop", f"a stop string has 1 to {MAX_STOP_LENGTH} characters")
    return stop


Stop = Annotated[str | Annotated[list[str], Field(max_length=MAX_STOPS)], AfterValidator(whole_stops)]
FORMATS = ("guided_regex", "guided_grammar", "response_format")  # what may say how an answer looks
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Sampling(Fields):
    """What both kinds of request have."""

    model: Annotated[str | None, Field(description="as /v1/models names it; may be left out")] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES, description="answers; with a seed, answer i has seed + i")] = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="the same request and seed give the same answer")] = None
    stop: Annotated[Stop | None, Field(description="the text ends before any of these")] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, description="1 if not given, as OpenAI has it; 0 is greedy")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0, description="0: all")] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2, description="counts tokens of the answer")] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2, description="counts tokens of the answer")] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, description="as in transformers: prompt and answer")] = None
    logit_bias: Annotated[dict[TokenId, Bias] | None, Field(description="token id -> added to its logit")] = None
    response_format: ResponseFormat | None = None
    guided_regex: Annotated[str | None, Field(min_length=1, description="the answer matches this regular expression")] = None
    guided_grammar: Annotated[str | None, Field(min_length=1, description="the answer matches this grammar, in Lark's notation")] = None
    speculation: Annotated[Literal["auto", "off"] | None, Field(description="changes the speed only; header: X-Dspark-Speculation")] = None
    dspark: Extras | None = None
    user: Annotated[str | None, Field(description="ignored")] = None

    @model_validator(mode="before")
    @classmethod
    def no_half_characters(cls, data: Any) -> Any:
        """Python's JSON lets half a surrogate pair pass, which no tokenizer takes."""
        if isinstance(data, dict) and any(has_surrogate(value) for value in data.values()):
            raise PydanticCustomError("surrogate", "the request holds half of a surrogate pair, which is no character")
        return data

    @model_validator(mode="after")
    def fits_together(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream: true")
        formats = [name for name in FORMATS if getattr(self, name) is not None]
        if len(formats) > 1 and not (len(formats) == 2 and isinstance(self.response_format, TextFormat)):
            raise PydanticCustomError(formats[0], "give only one of {names}", {"names": ", ".join(formats)})
        return self


def has_surrogate(value: Any) -> bool:
    """Whether a JSON value holds one, keys included. Without recursion: values may be nested deeply."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                return True
        elif isinstance(value, dict):
            rest += value.keys()
            rest += value.values()
        elif isinstance(value, list):
            rest += value
    return False


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, description="as max_tokens")] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    prediction: Annotated[Prediction | None, Field(description="what the answer will resemble: drafted where it fits")] = None
    metadata: Annotated[dict[str, Any] | None, Field(description="ignored")] = None
    store: Annotated[bool | None, Field(description="ignored: nothing is stored")] = None
    service_tier: Annotated[Literal["auto", "default"] | None, Field(description="ignored: there is one")] = None
    safety_identifier: Annotated[str | None, Field(description="ignored")] = None
    prompt_cache_key: Annotated[str | None, Field(description="ignored: every prompt is cached")] = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def chat_fits_together(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("max_tokens", "max_tokens and max_completion_tokens differ: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise PydanticCustomError("tools", "two tools have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise PydanticCustomError(
                "tool_choice", "tool_choice names {name}, which is not among the tools", {"name": self.tool_choice.function.name}
            )
        if self.tool_choice == "required" and not names:
            raise PydanticCustomError("tool_choice", "tool_choice is required, but there are no tools")
        if names and self.tool_choice != "none" and self.constrained:
            raise PydanticCustomError(
                "tools", "an answer cannot both follow a format and call tools: set tool_choice to none, or leave out one"
            )
        return self

    @property
    def constrained(self) -> bool:
        return not isinstance(self.response_format, TextFormat | None) or bool(self.guided_regex or self.guided_grammar)

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


Item = TypeVar("Item")
# one error is enough: a list of token ids is no list of texts in each of its items
Several = Annotated[list[Item], Field(min_length=1, fail_fast=True)]


class CompletionRequest(Sampling):
    prompt: Annotated[
        str | Several[str] | Several[int] | Several[Several[int]],
        Field(description="a text, several, or token ids; no chat template is applied"),
    ]  # fmt: skip
    logprobs: Annotated[int | None, Field(ge=0, le=5)] = None
    echo: Annotated[bool | None, Field(description="begin with the prompt; not with logprobs")] = None
    prediction: Prediction | None = None
    best_of: Annotated[int | None, Field(ge=1, description="only as many as n: answers are not ranked")] = None
    suffix: Annotated[None, Field(description="not supported")] = None

    @model_validator(mode="after")
    def completion_fits_together(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError("echo", "logprobs of a prompt are not supported: leave out echo or logprobs")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise PydanticCustomError("best_of", "best_of other than n is not supported: answers are not ranked")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


# ---- answers; documented and tested by these, built as dictionaries in answers.py


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Speculation(BaseModel):
    rounds: int
    drafted: int
    verified: int
    accepted: int
    seconds: float
    saved_seconds: Annotated[float, Field(description="plain decoding was expected to take seconds + saved_seconds")]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None
    dspark: Speculation


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class Completed(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatCompletion(Completed):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Completed):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "closing"]
    model: str
    running: int
    waiting: int


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorBody
