"""Answers from a server: the target's own tokens of what was said, asked for once, with bounds on all that can go on for ever."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dspark.cli.main import main
from dspark.errors import ServerError, SettingError
from dspark.server.api import Options, make_app
from dspark.target.load import load_target
from dspark.target.target import Target
from dspark.train import remote
from dspark.train.answers import read_answers
from dspark.train.remote import Server, ask_server, base_url, find_server
from saved import save_tiny_target
from serving import Says, running
from tiny import tiny_model
from words import END, HERMES, word_tokenizer

# Writes calls as Hermes does, reasoning in a tag, and ends each turn.
THINKS = """{% if tools %}<|system|>{{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{
m.content }}{% for call in m.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments": {{
call.function.arguments | tojson }}}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}

Reply = tuple[int, dict, dict]  # status, headers, body


def says(message: dict | str, reason: str = "stop") -> Reply:
    message = {"content": message} if isinstance(message, str) else message
    return 200, {}, {"choices": [{"index": 0, "finish_reason": reason, "message": {"role": "assistant", **message}}]}


@contextlib.contextmanager
def serving(answer: Callable[[dict], Reply], models: Reply = (404, {}, {})) -> Iterator[tuple[str, list[dict]]]:
    """A server on a loopback port that answers chats by `answer(body)`; its address, and the bodies it was sent."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, reply: Reply) -> None:
            status, headers, body = reply
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.reply(models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
            self.reply(answer(body))

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def words_target(template: str = THINKS) -> Target:
    tokenizer = word_tokenizer(template)
    model = tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=512)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return Target(model, tokenizer, name="words")


@pytest.fixture(scope="module")
def target() -> Target:
    return words_target()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.05)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)


def ask(target: Target, url: str, prompts: list[dict], work: Path, said: list[str] | None = None, **settings) -> list[dict]:
    work.mkdir(exist_ok=True)
    server = Server(url, "words", **settings)
    return ask_server(target, prompts, 60, 5, work, server, lambda *a: None, (said if said is not None else []).append)


def text(target: Target, record: dict) -> str:
    return target.tokenizer.decode(record["answer_ids"], skip_special_tokens=False)


def test_answers_are_the_targets_tokens_of_what_was_said(target, tmp_path):
    prompts = [{"prompt": f"n{i}", "kind": "count"} for i in range(5)]
    with serving(lambda body: says(f"I say {body['messages'][-1]['content']}")) as (url, asked):
        records = ask(target, url, prompts, tmp_path)
    assert [text(target, record) for record in records] == [f"I say n{i}{END}" for i in range(5)]
    assert [record["prompt_ids"] for record in records] == [target.prompt_ids(f"n{i}") for i in range(5)]
    assert [record["temperature"] for record in records] == [0.0, 0.7, 1.0, 0.0, 0.7] and records[0]["kind"] == "count"
    sent = sorted(asked, key=lambda body: body["seed"])
    assert [body["temperature"] for body in sent] == [0.0, 0.7, 1.0, 0.0, 0.7] and [body["seed"] for body in sent] == [5, 6, 7, 8, 9]
    assert all(b["path"] == "/v1/chat/completions" and b["model"] == "words" and b["max_tokens"] == 60 and b["key"] is None for b in asked)
    assert read_answers(tmp_path / "answers.jsonl", target.vocab_size, target.max_context) == records


def test_tool_calls_and_reasoning_are_kept_as_the_template_writes_them(target, tmp_path):
    chat = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
    ]
    replies = {
        "1+1": says({"content": None, "tool_calls": [CALL]}, "tool_calls"),
        "why": says({"content": "So.", "reasoning_content": "I think"}),
        "how": says({"content": "So.", "reasoning": "I ponder"}),
        "2": says("Two."),
    }
    prompts = [{"prompt": "1+1", "tools": TOOLS}, {"prompt": "why"}, {"prompt": "how"}, {"messages": chat, "tools": TOOLS}]
    with serving(lambda body: replies[body["messages"][-1]["content"]]) as (url, asked):
        records = ask(target, url, prompts, tmp_path)
    assert [text(target, record) for record in records] == [
        f'<tool_call>{{"name": "add", "arguments": {{"a": 1}}}}</tool_call>{END}',
        f"<think>I think</think>So.{END}",
        f"<think>I ponder</think>So.{END}",
        f"Two.{END}",
    ]
    assert sum("tools" in body for body in asked) == 2
    prompt = target.tokenizer.decode(records[3]["prompt_ids"], skip_special_tokens=False)
    assert '"arguments": {"a": 1}}' in prompt and "<|tool|>2" in prompt and '"name": "add"' in prompt
    assert any(body["messages"] == chat for body in asked)  # the server gets them as they are in the file


def test_what_the_template_would_lose_is_left_out_and_said(tmp_path):
    silent = words_target(THINKS.replace("{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}", ""))
    replies = {
        "thinks": says({"content": "So.", "reasoning_content": "I think"}),
        "long": says("and so on", "length"),
        "filtered": says("no", "content_filter"),
        "odd": says({"content": [{"type": "text", "text": "a"}]}),
        "broken": says({"content": "", "tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}, "tool_calls"),
        "bad": (400, {}, {"error": {"message": "no such thing"}}),
        "good": says("Yes."),
    }
    said: list[str] = []
    with serving(lambda body: replies[body["messages"][-1]["content"]]) as (url, asked):
        records = ask(silent, url, [{"prompt": name} for name in (*replies, "x" * 500)], tmp_path, said)
    assert [text(silent, record) for record in records] == [f"Yes.{END}"] and len(asked) == 7
    for what in ("1 answers of words", "1 whose reasoning", "1 cut at the limit", "1 that ended with 'content_filter'", "1 whose content is no text",
                 "1 that the target's chat template does not take", "1 refused by the server", "1 whose prompt is too long"):  # fmt: skip
        assert what in said[0]
    ignores = words_target(THINKS.replace("{% if tools %}<|system|>{{ tools | tojson }}<|im_end|>\n{% endif %}", ""))
    with serving(lambda body: says("Yes.")) as (url, asked):
        assert ask(ignores, url, [{"prompt": "1+1", "tools": TOOLS}], tmp_path / "tools", said) == [] and not asked
    assert "1 with tools" in said[-1]


def test_a_template_that_writes_no_end_of_turn_keeps_the_text(tmp_path):
    plain = words_target(HERMES.replace("\n{% endfor %}", "\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"))
    with serving(lambda body: says("Yes.")) as (url, _):
        assert text(plain, ask(plain, url, [{"prompt": "a"}], tmp_path)[0]).startswith("Yes.")


def test_a_killed_run_asks_for_nothing_twice(target, tmp_path):
    prompts = [{"prompt": f"n{i}"} for i in range(12)]

    def dies(body: dict) -> Reply:
        return says(body["messages"][-1]["content"]) if len(asked) <= 7 else (401, {}, {"error": "the key ended"})

    with serving(dies) as (url, asked), pytest.raises(ServerError, match="401 the key ended"):
        ask(target, url, prompts, tmp_path, concurrency=1)
    assert not (tmp_path / "answers.jsonl").exists()
    stored = (tmp_path / "replies.jsonl").read_text()
    assert stored.count("\n") == 7
    (tmp_path / "replies.jsonl").write_text(stored + '{"key": "torn')
    with serving(lambda body: says(body["messages"][-1]["content"])) as (url, asked):
        records = ask(target, url, prompts, tmp_path)
        assert len(asked) == 5
        assert [text(target, record) for record in records] == [f"n{i}{END}" for i in range(12)]
        assert ask(target, url, prompts, tmp_path) == records and len(asked) == 5
        (tmp_path / "answers.jsonl").unlink()  # other settings are other questions
        ask_server(target, prompts, 61, 5, tmp_path, Server(url, "words"), lambda *a: None, lambda text: None)
        assert len(asked) == 17


def test_no_more_requests_run_at_once_than_allowed(target, tmp_path):
    lock, now, most = threading.Lock(), [0], [0]

    def slow(body: dict) -> Reply:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.03)
        with lock:
            now[0] -= 1
        return says("a")

    with serving(slow) as (url, _):
        assert len(ask(target, url, [{"prompt": f"{i}"} for i in range(12)], tmp_path, concurrency=3)) == 12
    assert 2 <= most[0] <= 3


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_but_not_for_ever(target, tmp_path, status):
    def busy(body: dict) -> Reply:
        return (status, {"Retry-After": "3600"}, {}) if len(asked) < 3 else says("a")

    with serving(busy) as (url, asked):
        assert len(ask(target, url, [{"prompt": "a"}], tmp_path)) == 1 and len(asked) == 3
    with serving(lambda body: (status, {}, {"detail": "too much"})) as (url, asked):
        with pytest.raises(ServerError, match=f"gave no answer, {remote.TRIES} times: {status}"):
            ask(target, url, [{"prompt": "b"}], tmp_path / "other")
        assert len(asked) == remote.TRIES
    with pytest.raises(ServerError, match="gave no answer"):
        ask(target, url, [{"prompt": "b"}], tmp_path / "closed")


def test_a_server_that_refuses_everything_is_left(target, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "MOST_REFUSED", 4)
    with serving(lambda body: (400, {}, {"error": {"message": "max_tokens is too large"}})) as (url, asked):
        with pytest.raises(ServerError, match="400 max_tokens is too large"):
            ask(target, url, [{"prompt": f"{i}"} for i in range(40)], tmp_path, concurrency=1)
        assert len(asked) < 40
    for reply in ((200, {}, {"choices": []}), (200, {}, {"choices": [{"message": "a"}]})):
        with serving(lambda body, reply=reply: reply) as (url, _), pytest.raises(ServerError, match="holds no message"):
            ask(target, url, [{"prompt": "a"}], tmp_path / "none")


def test_the_key_is_sent_shown_nowhere_and_follows_no_redirect(target, tmp_path):
    with serving(lambda body: says("a")) as (other, elsewhere), serving(lambda body: (302, {"Location": other}, {})) as (url, asked):
        with pytest.raises(ServerError, match="302"):
            ask(target, url, [{"prompt": "a"}], tmp_path, api_key="s3cret")
        assert asked[0]["key"] == "Bearer s3cret" and not elsewhere
    assert "s3cret" not in repr(Server(url, "words", "s3cret")) + (tmp_path / "replies.jsonl").read_text()


def listing(*ids: str, **more: str) -> Reply:
    return 200, {}, {"object": "list", "data": [{"id": name, **more} for name in ids]}


def test_a_server_of_another_model_is_refused_if_it_says_so():
    for models, asked_for, found in (
        (listing("org/My-Model", "other"), None, "org/My-Model"),
        (listing("alias", root="/models/my-model/"), None, "alias"),
        (listing("alias"), "alias", "alias"),
        (listing(), None, "here/my-model"),
        ((404, {}, {}), None, "here/my-model"),
        ((200, {}, {"data": None}), "named", "named"),
    ):
        with serving(lambda body: says("a"), models) as (url, _):
            assert find_server(url, "here/my-model", asked_for).model == found
    with serving(lambda body: says("a"), listing("other", "third")) as (url, _):
        with pytest.raises(ServerError, match="serves other, third, and the target is here/my-model") as refused:
            find_server(url, "here/my-model")
        assert "--answers-model other" in refused.value.hint
        with pytest.raises(ServerError, match="serves no model 'fourth'"):
            find_server(url, "here/my-model", "fourth")
    with serving(lambda body: says("a"), (401, {}, {"error": {"message": "no key"}})) as (url, _):
        with pytest.raises(ServerError, match="401 no key") as refused:
            find_server(url, "here/my-model")
        assert "--api-key-env" in refused.value.hint
    with pytest.raises(ServerError, match="gave no answer, 2 times"):
        find_server(url, "here/my-model")


def test_addresses():
    assert base_url("http://host:8000") == base_url("http://host:8000/v1/") == base_url("http://host:8000/v1/chat/completions")
    assert base_url("https://host/openai/v1") == "https://host/openai/v1"
    for bad in ("host:8000", "ftp://host/v1", "http://", "http://host/v1?key=1"):
        with pytest.raises(SettingError, match="--answers-from"):
            base_url(bad)
    with pytest.raises(SettingError, match="holds a password") as refused:
        base_url("http://me:s3cret@host/v1")
    assert "s3cret" not in str(refused.value)


def test_other_words_than_the_targets_are_warned_of(target, tmp_path):
    said: list[str] = []
    with serving(lambda body: says("nothing that a random model would say")) as (url, _):
        ask(target, url, [{"prompt": "a"}], tmp_path, said)
    assert any("warning" in text and "is words this target" in text for text in said)
    record = {"prompt_ids": [1, 2, 3], "temperature": 0.0}
    own = target.model.generate(__import__("torch").tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 3:]
    assert remote.greedy_share(target, [{**record, "answer_ids": own.tolist()}]) == 1.0


def test_dsparks_own_server_answers(tmp_path):
    folder = save_tiny_target(tmp_path / "target", max_position_embeddings=512)
    target = load_target(folder)
    engine = Says(target, "It is so.</s>")
    with running(make_app(engine, Options("target"))) as url:
        server = find_server(url, str(folder))
        records = ask_server(target, [{"prompt": "Is it?"}], 40, 0, tmp_path, server, lambda *a: None, lambda text: None)
    engine.close(1.0)
    assert server.model == "target" and target.tokenizer.decode(records[0]["answer_ids"]) == "It is so.</s>"


def test_train_takes_its_answers_from_a_server_that_may_be_gone_when_it_resumes(tmp_path, capsys, monkeypatch):
    folder = save_tiny_target(tmp_path / "target", max_position_embeddings=512)
    monkeypatch.setenv("TINY_KEY", "s3cret")
    monkeypatch.setattr("dspark.train.run.CALIBRATION_TOKENS", 8)
    monkeypatch.setattr("dspark.train.run.ROUNDS_TOKENS", 12)
    monkeypatch.setattr("dspark.cli.train.break_even", lambda target, out: None)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(6)))
    start = ["train", folder, "--out", tmp_path / "out", "--prompts", prompts, "--num-prompts", 0, "--held-out", 2, "--dtype", "float32"]
    start += ["--max-answer-tokens", 40, "--steps", 2, "--sequences", 2, "--anchors", 4, "--draft-vocab", 0, "--layers", 1]

    def run(*arguments) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, _, err = run(*start, "--answers-from", "http://127.0.0.1:9/v1", "--api-key-env", "NO_SUCH_KEY")
    assert code == 2 and "there is no key" in err and not (tmp_path / "out").exists()
    with serving(lambda body: says(f"You said: {body['messages'][-1]['content']}"), listing("target")) as (url, asked):
        code, out, err = run(*start, "--answers-from", url, "--api-key-env", "TINY_KEY", "--concurrency", 2, "--only-answers")
        assert code == 0 and "6 answers" in out and len(asked) == 6 and asked[0]["key"] == "Bearer s3cret"
        assert "to sample answers" not in err
    code, out, err = run("train", folder, "--out", tmp_path / "out", "--resume")
    assert code == 0 and "head saved" in out, err
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert files and not any(b"s3cret" in file.read_bytes() for file in files)
    code, _, err = run("train", folder, "--out", tmp_path / "out", "--resume", "--answers-model", "other")
    assert code == 2 and "--answers-model is other" in err
