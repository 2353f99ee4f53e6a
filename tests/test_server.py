"""The server over a small random target: OpenAI's clients get what the target says, and every fault is named in their shape."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
import schemathesis
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from pydantic_ai import Agent
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from schemathesis.checks import CHECKS
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dspark.cli.main import main
from dspark.core.sampling import Law
from dspark.errors import LogitsError, SettingError, TargetError
from dspark.generation import generate
from dspark.server.answers import Vocabulary
from dspark.server.api import Options, make_app
from dspark.server.law import Bias, Penalties
from dspark.server.run import listen, serve
from dspark.target.target import Target
from saved import save_tiny_target
from serving import OneAtATime, Says, letters_target, running, wait_until
from tiny import tiny_model

CHAT = [{"role": "user", "content": "hi"}]
LONG = {"messages": CHAT, "max_tokens": 400, "temperature": 0, "speculation": "off"}  # one token a round
TEXT = "Er sagte: „Grüße, 世界!“ und ging 👋 dann – END. fort"


@pytest.fixture(scope="module")
def target() -> Target:
    return letters_target()


@pytest.fixture(scope="module")
def engine(target) -> OneAtATime:
    return OneAtATime(target)


@pytest.fixture(scope="module")
def url(engine):
    with running(make_app(engine, Options("letters"))) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)


@pytest.fixture(scope="module")
def http(engine):
    return TestClient(make_app(engine, Options("letters", max_request_bytes=20_000)), raise_server_exceptions=False)


def greedy(target, num: int = 24, **settings):
    return generate(target, None, target.prompt_ids(CHAT), num, temperature=0.0, drafter="none", **settings)


def chat(client, **settings):
    return client.chat.completions.create(**{"model": "letters", "messages": CHAT, "max_tokens": 24} | settings)


def text_of(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# ---- OpenAI's client


def test_a_chat_is_what_the_target_says(client, target):
    answer = chat(client, temperature=0)
    said = greedy(target)
    assert answer.choices[0].message.content == said.text != ""
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("chat.completion", "letters", "length")
    prompt = len(target.prompt_ids(CHAT))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (prompt, 24, prompt + 24)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.usage.completion_tokens_details is None
    assert answer.system_fingerprint.startswith("dspark_")


def test_a_streamed_chat_is_the_same_chat(client, target):
    chunks = list(chat(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == greedy(target).text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    assert all(c.usage is None for c in chunks[:-1]) and len({c.id for c in chunks}) == 1


def test_sources_come_only_when_asked_for_and_make_up_the_text(client, target):
    plain = list(chat(client, temperature=0, stream=True))
    assert not any(hasattr(chunk, "dspark") for chunk in plain)
    chunks = list(chat(client, temperature=0, stream=True, max_tokens=200, extra_body={"dspark": {"sources": True}}))
    tokens = [token for chunk in chunks if hasattr(chunk, "dspark") for token in chunk.dspark["tokens"]]
    assert "".join(token["text"] for token in tokens) == text_of(chunks) == greedy(target, 200).text
    assert {token["source"] for token in tokens} <= {"accepted", "corrected", "bonus", "plain"}
    assert len({token["source"] for token in tokens}) > 1


def test_the_default_temperature_is_one_and_a_seed_replays(client, target):
    texts = [chat(client, **seed).choices[0].message.content for seed in ({"seed": 5}, {"seed": 5}, {"seed": 6}, {}, {})]
    assert texts[0] == texts[1] and len(set(texts)) == 4


def test_answer_i_has_seed_plus_i(client):
    together = chat(client, n=3, seed=7)
    alone = [chat(client, seed=7 + i).choices[0].message.content for i in range(3)]
    assert [choice.message.content for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert together.usage.completion_tokens == 72
    assert together.usage.prompt_tokens == 4
    streamed = ["", "", ""]
    for chunk in chat(client, n=3, seed=7, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == alone


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_targets(client, target, stream):
    settings = {"temperature": 0, "logprobs": True, "top_logprobs": 3, "stop": None}
    if stream:
        entries = [e for c in chat(client, stream=True, **settings) if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    else:
        entries = chat(client, **settings).choices[0].logprobs.content
    said = greedy(target)
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == said.text
    ids = target.prompt_ids(CHAT)
    for entry, token in zip(entries, said.token_ids, strict=True):
        law = target.score(target.start(), ids, num_logits=1).logits_TV[0].log_softmax(-1)
        assert entry.logprob == pytest.approx(float(law[token]), abs=1e-3)
        best = law.topk(3)
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert bytes(entry.top_logprobs[0].bytes) == Vocabulary(target.tokenizer).bytes(int(best.indices[0]))
        ids = [*ids, token]


def test_completions_take_texts_and_ids(client, target):
    both = client.completions.create(model="letters", prompt=["hi", "ho"], max_tokens=8, temperature=0)
    ids = target.tokenizer("ho").input_ids
    alone = client.completions.create(model="letters", prompt=ids, max_tokens=8, temperature=0)
    assert both.choices[1].text == alone.choices[0].text == generate(target, None, ids, 8, drafter="none").text
    assert both.usage.prompt_tokens == 4 and both.usage.completion_tokens == 16
    assert client.completions.create(model="letters", prompt=[ids, ids], temperature=0).usage.completion_tokens == 32  # 16 by default
    streamed = client.completions.create(model="letters", prompt="ho", max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == alone.choices[0].text


def test_completions_echo_and_logprobs(client, target):
    settings = {"model": "letters", "prompt": "hi there", "max_tokens": 6, "temperature": 0}
    said = client.completions.create(**settings).choices[0].text
    assert client.completions.create(echo=True, **settings).choices[0].text == "hi there" + said
    streamed = client.completions.create(echo=True, stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "hi there" + said
    found = client.completions.create(logprobs=2, **settings).choices[0].logprobs
    assert "".join(found.tokens) == said
    assert all(said[offset:].startswith(token) for offset, token in zip(found.text_offset, found.tokens, strict=True))
    assert all(max(top.values()) == pytest.approx(own) for top, own in zip(found.top_logprobs, found.token_logprobs, strict=True))
    parts = [c.choices[0].logprobs for c in client.completions.create(logprobs=0, stream=True, **settings) if c.choices[0].logprobs]
    assert [offset for part in parts for offset in part.text_offset] == found.text_offset


@pytest.mark.parametrize("step", [1, 2, 3, 7])
@pytest.mark.parametrize("stop", [["END."], ["– E", "fort"], ["界!“"], [" 👋"]])
def test_stop_strings_are_cut_wherever_steps_end(target, step, stop):
    app = TestClient(make_app(Says(target, TEXT, step=step), Options("letters")))
    body = {"messages": CHAT, "stop": stop}
    choice = app.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (TEXT[: TEXT.index(stop[0])], "stop")
    events = app.post("/v1/chat/completions", json=body | {"stream": True}).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == choice["message"]["content"]
    assert not any("\ufffd" in json.dumps(chunk, ensure_ascii=False) for chunk in chunks)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["letters"]
    assert client.models.retrieve("letters").owned_by == "dspark"
    with pytest.raises(openai.NotFoundError, match="this server has 'letters'"):
        client.models.retrieve("gpt-9/x")
    with pytest.raises(openai.NotFoundError):
        chat(client, model="gpt-9")


def test_what_clients_send_along_is_taken(client, target):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}], "name": "Ann"},
        {"role": "assistant", "content": "ho", "refusal": None},
        {"role": "user", "content": "hi"},
    ]
    extras = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "modalities": ["text"],
    }
    answer = chat(client, messages=messages, max_tokens=None, max_completion_tokens=4, temperature=0, **extras)
    plain = [{"role": "system", "content": "be brief"}, CHAT[0], {"role": "assistant", "content": "ho"}, CHAT[0]]
    assert answer.choices[0].message.content == generate(target, None, target.prompt_ids(plain), 4, drafter="none").text


def test_without_a_limit_the_answer_may_fill_the_context(client, target):
    answer = chat(client, max_tokens=None, temperature=0, logit_bias={str(next(iter(target.eos_ids))): -100})
    assert answer.usage.total_tokens == target.max_context and answer.choices[0].finish_reason == "length"


def test_speculation_by_field_and_header(client, engine):
    header = {"X-Dspark-Speculation": "off"}
    for given_so, speculates in [
        ({}, True),
        ({"extra_headers": header}, False),
        ({"extra_body": {"speculation": "off"}}, False),
        ({"extra_body": {"speculation": "auto"}, "extra_headers": header}, True),
    ]:
        chat(client, max_tokens=1, **given_so)
        assert engine.requests[-1].speculate is speculates
    with pytest.raises(openai.BadRequestError, match="x-dspark-speculation: "):
        chat(client, extra_headers={"X-Dspark-Speculation": "maybe"})


def test_a_prediction_is_passed_on_and_accounted_for(client, engine, target):
    said = greedy(target).text
    answer = chat(client, temperature=0, prediction={"type": "content", "content": said + "zzz"})
    assert engine.requests[-1].predicted_ids == target.tokenizer(said + "zzz").input_ids
    details = answer.usage.completion_tokens_details
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens == len(engine.requests[-1].predicted_ids)
    assert details.accepted_prediction_tokens >= 20 and answer.choices[0].message.content == said


# ---- the law


def test_penalties_count_the_answer_only_and_change_nothing_in_place():
    logits = torch.zeros(1, 8)
    ids = torch.tensor([[1, 2, 2, 3, 3, 4]])
    assert Penalties(3, 0.5, 0.25)(ids, logits).tolist() == [[0, 0, 0, -1.0, -0.75, 0, 0, 0]]
    assert Penalties(6, 0.5, 0.25)(ids, logits).tolist() == logits.tolist() == [[0.0] * 8]
    assert Bias({2: -100.0, 5: 1.5}, 8)(ids, logits).tolist() == [[0, 0, -100.0, 0, 0, 1.5, 0, 0]]
    with pytest.raises(SettingError, match="token 8, outside the target's vocabulary of 8"):
        Bias({8: 1.0}, 8)


def test_penalised_answers_are_those_of_one_token_at_a_time(client, target):
    """With drafts by prompt lookup, which a penalised text leaves no easy guesses."""
    ids, answer = target.prompt_ids(CHAT), []
    favoured = target.tokenizer.convert_tokens_to_ids("q")
    for _ in range(40):
        logits = target.score(target.start(), [*ids, *answer], num_logits=1).logits_TV[0].clone()
        for token in set(answer):
            logits[token] -= 0.5 + 0.75 * answer.count(token)
        logits[favoured] += 2
        answer.append(int(logits.argmax()))
    settings = {"presence_penalty": 0.5, "frequency_penalty": 0.75, "logit_bias": {str(favoured): 2}, "temperature": 0, "max_tokens": 40}
    for speculation in ("auto", "off"):
        found = chat(client, extra_body={"speculation": speculation}, **settings).choices[0].message.content
        assert found == target.tokenizer.decode(answer, skip_special_tokens=True)
    assert found != greedy(target, 40).text


def test_every_sampling_setting_reaches_the_law(client, engine):
    extra = {"top_k": 7, "min_p": 0.01, "repetition_penalty": 1.3}
    chat(client, temperature=0.7, top_p=0.8, presence_penalty=1.0, logit_bias={"3": -1}, extra_body=extra)
    law: Law = engine.requests[-1].law
    assert [type(p).__name__ for p in law.processors] == ["RepetitionPenaltyLogitsProcessor", "Penalties", "Bias"]
    kinds = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
    assert all(isinstance(w, kind) for w, kind in zip(law.warpers, kinds, strict=True))
    assert law.temperature == pytest.approx(0.7) and not law.greedy


# ---- refusals

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"foo": 1}, "foo", "foo is not supported"),
        ({"audio": None}, "audio", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "needs content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
            "image_url",
        ),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, None, "surrogate"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "messages.0.tool_call_id", "tool_call_id"),
        (
            {"messages": [{"role": "user", "content": "a" * 600}]},
            "messages",
            "602 tokens, and the model's context is 512 for prompt and answer: shorten the prompt",
        ),
        (
            {"max_tokens": 600},
            "max_tokens",
            "max_tokens is 600, and at most 508 fit: the prompt has 4 tokens, and the model's context is 512",
        ),
        ({"max_tokens": None, "max_completion_tokens": 509}, "max_completion_tokens", "max_completion_tokens is 509, and at most 508 fit"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 1e-9}, None, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 65}, "n", "64"),
        ({"seed": -1}, "seed", "0"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": ""}, "stop", "1 to 500 characters"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "pattern"),
        ({"logit_bias": {"9999": 1}}, None, "token 9999, outside"),
        ({"logit_bias": {"3": 101}}, "logit_bias.3", "100"),
        ({"response_format": {"type": "xml"}}, "response_format", "xml"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a+"}, "guided_regex", "only one of"),
        ({"guided_regex": ""}, "guided_regex", "at least 1 character"),
        ({"guided_grammar": ""}, "guided_grammar", "at least 1 character"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "sun"}}}, "tool_choice", "sun"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "same name"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "tools", "tool_choice to none"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}, "response_format", "JSON schema"),
        ({"guided_regex": "("}, "guided_regex", "cannot be followed"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]}, "tools", "schema of an object"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": 5}}}], "tool_choice": "required"},
            "tools",
            "cannot be followed",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]}]},
            "messages",
            "JSON",
        ),
        ({"speculation": "on"}, "speculation", "'auto' or 'off'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_request_with_a_fault_is_refused_with_the_reason(http, changes, param, says):
    body = json.dumps({"messages": CHAT, "max_tokens": 4} | changes)
    answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param) and says in error["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "prompt: field required"),
        ({"prompt": ""}, "empty"),
        ({"prompt": [5000]}, "5000 is outside"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * 40, "n": 2}, "more than 64"),
        ({"prompt": "a", "suffix": "b"}, "suffix is not supported"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "a", "logprobs": 6}, "5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_completion_with_a_fault_is_refused(http, body, says):
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b"{", "application/json", "not JSON"),
        (b"", "application/json", "JSON object"),
        (b"[1]", "application/json", "JSON object"),
        (b"[" * 5000, "application/json", "too deeply"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "application/json", "too long"),
        (b"\xff\xfe", "application/json", "JSON"),
        (b'{"a": "\xff"}', "application/json", "not UTF-8"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(http, content, kind, says):
    answer = http.post("/v1/chat/completions", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("kind", [None, "", "text/plain", "json", "application/x-www-form-urlencoded"])
def test_a_body_of_another_content_type_is_refused_by_the_headers_name(http, kind):
    body = json.dumps({"messages": CHAT, "max_tokens": 4})
    answer = http.post("/v1/chat/completions", content=body, headers={} if kind is None else {"Content-Type": kind})
    told = "the body was not read as JSON: send the header Content-Type: application/json with it"
    assert answer.status_code == 400
    assert answer.json() == {"error": {"message": told, "type": "invalid_request_error", "param": None, "code": None}}
    for right in ("application/json; charset=utf-8", "APPLICATION/JSON"):
        assert http.post("/v1/chat/completions", content=body, headers={"Content-Type": right}).status_code == 200


def test_nesting_that_only_a_later_step_cannot_take_is_refused(http):
    pytest.importorskip("dspark.server.tools")
    schema = '{"type": "object", "properties": {"a": ' * 400 + "{}" + "}}" * 400
    body = f'{{"messages": {json.dumps(CHAT)}, "max_tokens": 4, "tools": [{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}]}}'
    assert http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}).status_code in (200, 400)


def test_unknown_paths_and_methods_have_the_same_shape(http):
    error = http.post("/v1/responses", json={"input": "x"}).json()["error"]
    assert error["type"] == "not_found_error" and "/v1/chat/completions" in error["message"]
    answer = http.delete("/v1/models")
    assert answer.status_code == 405 and answer.json()["error"]["message"] and answer.headers["allow"] == "GET"


def test_a_request_that_is_too_large_is_refused(http):
    huge = {"messages": [{"role": "user", "content": "a" * 30_000}]}
    chunks = (piece for piece in [json.dumps(huge).encode()])  # says no size beforehand
    for answer in (
        http.post("/v1/chat/completions", json=huge),
        http.post("/v1/chat/completions", content=chunks, headers={"Content-Type": "application/json"}),
    ):
        assert answer.status_code == 413 and "20000 bytes" in answer.json()["error"]["message"]


def test_an_api_key_is_asked_for(engine):
    http = TestClient(make_app(engine, Options("letters", api_key="sesame")))
    for headers, says in (({}, "Authorization: Bearer"), ({"Authorization": "Bearer sésame".encode("latin-1")}, "not the server's")):
        answer = http.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 1}, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key") and says in answer.json()["error"][
            "message"
        ]
    assert http.get("/v1/models").status_code == 401 and http.get("/health").status_code == 200
    assert http.get("/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200
    assert http.get("/openapi.json").json()["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}


def test_a_full_queue_says_when_to_try_again(target):
    engine = OneAtATime(target, max_waiting=1, pause=0.05)
    with running(make_app(engine, Options("letters"))) as url, httpx.Client(base_url=url, timeout=20) as http:
        body = LONG | {"stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body), http.stream("POST", "/v1/chat/completions", json=body):
            answer = http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert http.get("/health").json() == {"status": "ok", "model": "letters", "running": 1, "waiting": 1}
            # of three answers one finds a place, and is given back
            assert http.post("/v1/chat/completions", json=LONG | {"n": 3}).status_code == 429
        assert wait_until(lambda: not engine.running and not engine.waiting)


def test_answers_that_find_no_place_take_their_siblings_along(target):
    engine = OneAtATime(target, max_waiting=2, pause=0.05)
    http = TestClient(make_app(engine, Options("letters")))
    assert http.post("/v1/chat/completions", json=LONG | {"n": 8}).status_code == 429
    assert len(engine.cancelled) == engine.number > 0


def test_an_answer_that_takes_too_long_is_ended(target):
    engine = OneAtATime(target, pause=0.05)
    http = TestClient(make_app(engine, Options("letters", request_seconds=0.3)))
    answer = http.post("/v1/chat/completions", json=LONG)
    assert answer.status_code == 504 and "0.3 seconds" in answer.json()["error"]["message"]
    events = http.post("/v1/chat/completions", json=LONG | {"stream": True}).text.split("\n\n")
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "timeout" and events[-2] == "data: [DONE]"
    assert engine.cancelled == {1, 2}


def test_failures_of_the_engine(client, engine):
    engine.fail = RuntimeError("secret detail")
    with pytest.raises(openai.InternalServerError, match="its log says why") as failed:
        chat(client)
    assert "secret" not in str(failed.value)
    engine.fail = LogitsError("no token is possible")
    with pytest.raises(openai.BadRequestError, match="no token is possible"):
        chat(client)
    engine.fail = RuntimeError("secret detail")
    with pytest.raises(openai.APIError, match="its log says why"):
        list(chat(client, stream=True))
    assert chat(client).choices[0].finish_reason in ("length", "stop")


def test_targets_that_cannot_chat_say_so():
    http = TestClient(make_app(OneAtATime(letters_target(template=None)), Options("letters")))
    answer = http.post("/v1/chat/completions", json={"messages": CHAT})
    assert answer.status_code == 400 and "no chat template" in answer.json()["error"]["message"]
    assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    with pytest.raises(TargetError, match="no tokenizer"):
        make_app(OneAtATime(Target(tiny_model("llama"))), Options("letters"))


def test_a_template_that_refuses_the_roles_is_the_clients_fault():
    strict = "{{ raise_exception('roles must alternate') }}"
    http = TestClient(make_app(OneAtATime(letters_target(template=strict)), Options("letters")))
    answer = http.post("/v1/chat/completions", json={"messages": CHAT})
    assert answer.status_code == 400 and "roles must alternate" in answer.json()["error"]["message"]


# ---- coming and going


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_cancels_its_answers(target, stream):
    engine = OneAtATime(target, pause=0.03)
    body = LONG | {"n": 2, "stream": stream}
    with running(make_app(engine, Options("letters"))) as url:
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=url, timeout=0.3) as http:
            if stream:
                with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                    next(answer.iter_lines())
                    raise httpx.ReadTimeout("enough")
            http.post("/v1/chat/completions", json=body)
        assert wait_until(lambda: engine.cancelled == {1, 2}, 3)
        assert wait_until(lambda: not engine.running and not engine.waiting, 3)


@pytest.mark.parametrize(("drain", "number"), [(20.0, signal.SIGTERM), (0.0, signal.SIGINT)])
def test_a_signal_lets_answers_finish_within_the_time_given(target, drain, number):
    app, found = make_app(OneAtATime(target, pause=0.05), Options("letters")), {}

    def be_client(url: str) -> None:
        body = LONG | {"max_tokens": 30, "stream": True}
        with httpx.Client(base_url=url, timeout=20) as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            found["first"] = json.loads(next(lines).removeprefix("data: "))
            os.kill(os.getpid(), number)
            if drain:
                wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
                found["health"] = httpx.get(f"{url}/health").json()["status"]
                found["refused"] = httpx.post(f"{url}/v1/chat/completions", json=body)
            found["rest"] = [line for line in lines if line]

    client: list[threading.Thread] = []

    def start_client(url: str) -> None:
        client.append(threading.Thread(target=be_client, args=(url,)))
        client[0].start()

    said: list[str] = []
    serve(app, listen("127.0.0.1", 0), drain, start_client, said.append)
    client[0].join(10)
    assert found["first"]["choices"][0]["delta"]["role"] == "assistant"
    assert found["rest"][-1] == "data: [DONE]" and "closing: answers that run have" in said[0]
    last = json.loads(found["rest"][-2].removeprefix("data: "))
    if drain:
        assert last["choices"][0]["finish_reason"] == "length" and found["health"] == "closing"
        assert found["refused"].status_code == 503 and found["refused"].json()["error"]["code"] == "closing"
    else:
        assert last["error"]["code"] == "closing"


def test_a_port_in_use_is_said():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SettingError, match=f"port {port} on .* is in use"):
            listen("127.0.0.1", port)
    with pytest.raises(SettingError, match="cannot listen on nowhere"):
        listen("nowhere.invalid", 8000)
    with pytest.raises(SettingError, match="--port is 70000"):
        listen("127.0.0.1", 70000)


def test_the_verb_says_what_is_wrong_before_it_loads_anything(capsys, monkeypatch):
    def fails(*arguments: str) -> str:
        assert main(["serve", *arguments]) == 2
        return capsys.readouterr().err

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        said = fails("--port", str(other.getsockname()[1]))
        assert said.startswith("error: port ") and "is in use\nhint: " in said
    assert "--max-running is 0" in fails("--max-running", "0")
    assert "--cache-gb is -1" in fails("--cache-gb", "-1")
    monkeypatch.delitem(sys.modules, "dspark.server.run")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "error: the server needs uvicorn" in (said := fails()) and "pip install 'dspark[serve]'" in said


def test_the_verb_serves_a_folder(tmp_path, capfd, monkeypatch):
    pytest.importorskip("dspark.engine.engine")
    pytest.importorskip("dspark.server.metrics")
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    folder, found = save_tiny_target(tmp_path / "tiny", max_position_embeddings=512), {}

    def be_client() -> None:
        said, give_up = "", time.monotonic() + 60
        while "curl " not in said and time.monotonic() < give_up:
            time.sleep(0.05)
            said += capfd.readouterr().out
        if "curl " in said:
            try:
                ask(said)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

    def ask(said: str) -> None:
        url = said.split("curl ")[1].split("/v1/", maxsplit=1)[0]
        found["model"] = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer sesame"}).json()["data"][0]["id"]
        command = said[said.index("curl ") :].replace("$DSPARK_API_KEY", "sesame")
        found["answer"] = json.loads(subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=True).stdout)

    client = threading.Thread(target=be_client, daemon=True)
    client.start()
    monkeypatch.setenv("DSPARK_API_KEY", "sesame")
    assert main(["serve", str(folder), "--head", "none", "--port", "0", "--dtype", "float32", "--cache-gb", "0.1", "--canary", "1"]) == 0
    client.join(10)
    assert found["model"] == "tiny" and found["answer"]["usage"]["completion_tokens"] >= 1


# ---- tool calls and grammars, once their modules are there


@pytest.fixture(scope="module")
def roomy() -> Target:
    """With place for descriptions of tools, a token a byte."""
    return letters_target(max_context=2048)


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


@pytest.mark.parametrize("step", [1, 4, 50])
@pytest.mark.parametrize("parallel", [True, False])
def test_tool_calls_are_found_whatever_the_steps(roomy, step, parallel):
    pytest.importorskip("dspark.server.tools")
    engine = Says(roomy, f"Let me see. {CALL}\n{CALL}", step=step)
    body = {"messages": CHAT, "max_tokens": 400, "tools": [WEATHER], "parallel_tool_calls": parallel, "tool_choice": "auto"}
    with running(make_app(engine, Options("letters"))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
        choice = client.chat.completions.create(model="letters", **body).choices[0]
        chunks = list(client.chat.completions.create(model="letters", stream=True, **body))
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    calls = choice.message.tool_calls
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [("weather", {"city": "Köln"})] * (2 if parallel else 1)
    assert len({call.id for call in calls}) == len(calls)
    assert text_of(chunks) == "Let me see." and chunks[-1].choices[0].finish_reason == "tool_calls"
    streamed = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.index for call in streamed] == list(range(len(calls)))
    assert "weather" in roomy.tokenizer.decode(engine.requests[-1].prompt_ids)


def test_a_call_that_the_limit_cuts_is_left_out_and_the_limit_is_named(roomy):
    text = f"Let me see. {CALL}\n{CALL}"
    http = TestClient(make_app(Says(roomy, text), Options("letters")))
    whole = len(roomy.tokenizer(text[: text.rindex("\n<tool_call>")]).input_ids)  # the first call's end
    for limit in (*range(1, whole + 30, 7), whole, whole + 15):
        body = {"messages": CHAT, "max_tokens": limit, "tools": [WEATHER]}
        choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
        said = http.post("/v1/chat/completions", json=body | {"stream": True}).text
        chunks = [json.loads(line[6:])["choices"][0] for line in said.split("\n\n") if line.startswith("data: {")]
        assert choice["finish_reason"] == chunks[-1]["finish_reason"] == "length"
        content = choice["message"]["content"] or ""
        assert "Let me see.".startswith(content) and "".join(chunk["delta"].get("content") or "" for chunk in chunks) == content
        calls = choice["message"].get("tool_calls", [])
        streamed = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", ())]
        assert [call["function"] for call in calls] == [call["function"] for call in streamed]
        assert all(json.loads(call["function"]["arguments"]) == {"city": "Köln"} for call in calls)
        assert len(calls) == 1 if limit >= whole else len(calls) == 0 or limit > whole - len("\n</tool_call>")


def test_an_agent_is_told_of_a_call_that_was_cut(roomy):
    engine = Says(roomy, CALL)
    with running(make_app(engine, Options("letters"))) as url:
        provider = OpenAIProvider(openai_client=openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20))
        agent = Agent(OpenAIChatModel("letters", provider=provider), model_settings={"max_tokens": 30})
        agent.tool_plain(lambda city: pytest.fail("called"), name="weather", description="of a city")
        with pytest.raises(UnexpectedModelBehavior, match="token limit"):
            agent.run_sync("And the weather?")


def test_an_agent_calls_a_tool_and_goes_on(roomy):
    pytest.importorskip("dspark.server.tools")
    engine = Says(roomy, CALL, "Sunny in Köln.")
    with running(make_app(engine, Options("letters"))) as url:
        provider = OpenAIProvider(openai_client=openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20))
        agent = Agent(OpenAIChatModel("letters", provider=provider), system_prompt="be brief")
        asked = []

        @agent.tool_plain
        def weather(city: str) -> str:
            """The weather of a city."""
            asked.append(city)
            return "sunny"

        assert agent.run_sync("And the weather?").output == "Sunny in Köln."
    assert asked == ["Köln"]
    first, second = (roomy.tokenizer.decode(request.prompt_ids) for request in engine.requests)
    assert "The weather of a city." in first and "sunny" in second and second.count("weather") > first.count("weather")


def test_tools_that_are_not_to_be_called_are_not_shown(target):
    engine = Says(target, CALL)
    http = TestClient(make_app(engine, Options("letters")))
    choice = http.post("/v1/chat/completions", json={"messages": CHAT, "tools": [WEATHER], "tool_choice": "none"}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
    assert engine.requests[-1].prompt_ids == target.prompt_ids(CHAT)


def test_an_answer_follows_its_grammar(roomy):
    pytest.importorskip("dspark.engine.grammar")
    http = TestClient(make_app(OneAtATime(roomy), Options("letters")))
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for stream in (False, True):
        answer = chat(client, response_format=form, max_tokens=60, seed=1, stream=stream)
        assert isinstance(json.loads(text_of(answer) if stream else answer.choices[0].message.content)["a"], int)
    assert chat(client, extra_body={"guided_regex": "(ab){3}"}).choices[0].message.content == "ababab"
    assert chat(client, extra_body={"guided_grammar": 'start: "x" /[0-9]{2}/'}).choices[0].message.content[0] == "x"
    now = {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
    }
    for choice in ("required", {"type": "function", "function": {"name": "now"}}):
        answer = chat(client, tools=[now], tool_choice=choice, max_tokens=90, parallel_tool_calls=False).choices[0]
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        assert [(call.function.name, json.loads(call.function.arguments)) for call in answer.message.tool_calls] == [("now", {})]
    with pytest.raises(openai.BadRequestError):
        chat(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}})


@pytest.mark.parametrize(
    ("strict", "more", "held"),
    [(True, {"tool_choice": "auto"}, True), (True, {}, True), (False, {}, False), (True, {"tool_choice": "none"}, False)],
)
def test_where_the_model_chooses_calls_of_strict_functions_follow_their_schemas(roomy, strict, more, held):
    """The tiny model opens no call by itself: what may follow is asked."""
    engine = Says(roomy, "No.")
    http = TestClient(make_app(engine, Options("letters")))
    tool = {"type": "function", "function": WEATHER["function"] | {"strict": strict}}
    assert http.post("/v1/chat/completions", json={"messages": CHAT, "tools": [tool]} | more).status_code == 200
    request = engine.requests[-1]
    assert len(request.law.processors) == (1 if held else 0)
    if held:
        opened = [*request.prompt_ids, *roomy.tokenizer('<tool_call>\n{"name": "', add_special_tokens=False).input_ids]
        assert request.propose(request.prompt_ids) == []
        assert roomy.tokenizer.decode(request.propose(opened)) == 'weather", "arguments": {'


def test_a_strict_function_whose_schema_cannot_be_followed_is_refused(roomy):
    http = TestClient(make_app(Says(roomy, "No."), Options("letters")))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
    for strict, status in ((True, 400), (False, 200)):
        answer = http.post(
            "/v1/chat/completions", json={"messages": CHAT, "tools": [tool | {"function": tool["function"] | {"strict": strict}}]}
        )
        assert answer.status_code == status and (status == 200 or "parameters" in answer.json()["error"]["message"])


def test_metrics_hear_of_every_request(target):
    pytest.importorskip("dspark.server.mount")
    from dspark.server.metrics import Metrics

    engine, metrics = OneAtATime(target), Metrics(None)
    http = TestClient(make_app(engine, Options("letters"), metrics))
    http.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 5, "n": 2})
    engine.fail = RuntimeError("broken")
    TestClient(http.app, raise_server_exceptions=False).post("/v1/chat/completions", json={"messages": CHAT})
    text = http.get("/metrics").text
    assert 'dspark_requests_total{end="failed"} 1.0' in text
    assert 'dspark_requests_total{end="length"} 2.0' in text
    assert http.get("/").headers["content-type"].startswith("text/html")


# ---- the document


def test_the_document_names_every_field_and_status(http):
    document = http.get("/openapi.json").json()
    responses = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(responses) == {"200", "400", "404", "413", "429", "500", "503", "504"}
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"messages", "speculation", "prediction", "guided_regex"} <= set(document["components"]["schemas"]["ChatRequest"]["properties"])


def fuzz(engine, examples: int) -> None:
    """Random requests that fit the document, and such that do not: no answer may be one that the document does not name."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(engine, Options("letters")))
    # A request may fit the document and still not make sense as a whole: a limit beyond the context, an unknown model.
    left_out = CHECKS.get_by_names(["positive_data_acceptance"])
    for found in schema.get_all_operations():
        operation = found.ok()
        # what takes no body cannot be asked wrongly
        for mode in schemathesis.GenerationMode if operation.method == "post" else [schemathesis.GenerationMode.POSITIVE]:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
            def check(case):
                if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
                    case.body["max_tokens"] = min(case.body["max_tokens"], 3)  # long answers are not what is tested
                case.call_and_validate(excluded_checks=left_out)

            check()


def test_the_document_gives_no_schema_for_a_stream_of_events(engine):
    """A schema there is read by some as that of one event, by others as that of all of them."""
    document = make_app(engine, Options("letters")).openapi()
    answers = [path["post"]["responses"]["200"]["content"] for path in document["paths"].values() if "post" in path]
    assert any("text/event-stream" in content for content in answers)
    assert all("schema" not in content.get("text/event-stream", {}) for content in answers)


def test_the_app_keeps_its_document(engine):
    fuzz(engine, 8)


@pytest.mark.slow
def test_the_app_keeps_its_document_under_many_requests(engine):
    fuzz(engine, 400)
