"""Answers from a server that runs the target: `/v1/chat/completions` of any OpenAI-compatible one.

Every reply is kept in `replies.jsonl` under the hash of what was asked, so a killed run asks for none of them again, in whatever
order they came. `answers.jsonl` is made of them: the text that the target's own chat template writes for a message, reasoning and
tool calls with it, in the target's own tokens."""

import hashlib
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dspark.errors import ServerError, SettingError
from dspark.target.target import Target
from dspark.train.answers import TEMPERATURES, Progress, for_template, read_records, write_records

TRIES = 6  # of one request: after 1, 2, 4, 8 and 16 seconds, or longer if the server asks for it, up to a minute
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
SECONDS = 600.0  # without a byte from the server
TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
# Answers that no other prompt would fare better with, and what to do then.
WAYS_OUT = {
    **dict.fromkeys((401, 403), "name the variable that holds its key: --api-key-env NAME"),
    **dict.fromkeys((404, 405), "check the address of --answers-from, up to /v1, and --answers-model"),
    **dict.fromkeys((301, 302, 303, 307, 308), "it is elsewhere: give that address as --answers-from"),
}
MOST_REFUSED = 20  # prompts; a server that refuses more, and more than it answers, is not asked further
MOST_REPLY_BYTES = 2**26
REASONING = ("reasoning_content", "reasoning", "thinking")  # names that servers and templates have for it
WHOLE = ("stop", "tool_calls", "function_call")
CHECKED, LEAST_AGREEMENT = 4, 0.8  # greedy answers compared with the target; share of tokens that are its own choice


@dataclass(frozen=True)
class Server:
    """Where to ask, for which of its models, and how many requests at once. The key is sent and kept nowhere."""

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 8


class Refused(ServerError):
    """The server answered with an error that trying again does not mend."""

    def __init__(self, status: int, message: str, hint: str | None = None):
        super().__init__(message, hint)
        self.status = status


class Unwritten(Exception):
    """A message that the target's template does not write as it was said."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Or the API key would be sent on to whoever is named there."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def base_url(url: str) -> str:
    """The address that `/chat/completions` is put behind. Raises `SettingError` for what is none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise SettingError(f"--answers-from is {url!r}", "give the address of a server, like http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise SettingError(
            "--answers-from holds a password, and would be kept with the settings", "give it by --api-key-env, without its value"
        )
    url = url.rstrip("/").removesuffix("/chat/completions")
    return url if urlsplit(url).path else f"{url}/v1"


def api_key(variable: str | None) -> str | None:
    """The value of the environment variable. Raises `SettingError` where it holds nothing that can be a key."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise SettingError(f"--api-key-env is {variable}, and there is no key in that environment variable", f"export {variable}=KEY")
    return key


def find_server(url: str, target_name: str, model: str | None = None, key: str | None = None, concurrency: int = 8) -> Server:
    """The server at this address and which of its models to ask: `model`, else the one that is named as the target.

    Raises `ServerError` where nothing answers, and where the server names its models and none is the one to ask."""
    server = Server(base_url(url), model or target_name, key, concurrency)
    try:
        listed = call(server, "/models", tries=2)
        names = {str(m["id"]): [m["id"], m.get("root")] for m in listed["data"]}
    except Refused as error:
        if error.status in (401, 403):
            raise
        return server  # it does not say
    except (TypeError, KeyError, AttributeError):
        return server
    if not names or model in names:
        return server
    served = ", ".join(names)
    if model is not None:
        raise ServerError(f"{server.url} serves no model {model!r}, but {served}", "give one of these as --answers-model")
    same = [name for name, called in names.items() if last_part(target_name) in {last_part(c) for c in called if c}]
    if not same:
        raise ServerError(
            f"{server.url} serves {served}, and the target is {target_name}",
            f"if it is the same model under another name, say so: --answers-model {next(iter(names))}",
        )
    return Server(server.url, same[0], key, concurrency)


def last_part(name: str) -> str:
    return str(name).rstrip("/").rsplit("/", 1)[-1].lower()


def call(
    server: Server, path: str, body: dict | None = None, tries: int = TRIES, closing: threading.Event | None = None
) -> dict:  # fmt: skip
    """What the server answers to a POST of `body`, or a GET. Busy and broken servers are tried again.

    Raises `Refused` for an error of the request, `ServerError` when the last try fails too."""
    closing, reason = closing or threading.Event(), ""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if server.api_key:
        headers["Authorization"] = f"Bearer {server.api_key}"
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(NoRedirect)
    for attempt in range(tries):
        wait = FIRST_WAIT * 2.0**attempt
        try:
            request = urllib.request.Request(server.url + path, data, headers)
            with opener.open(request, timeout=SECONDS) as reply:
                found = json.loads(reply.read(MOST_REPLY_BYTES))
            if isinstance(found, dict):
                return found
            reason = "its reply is no JSON object"
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {said(error)}"
            if error.code not in TRY_AGAIN:
                raise Refused(error.code, f"{server.url}{path} answers {reason}", WAYS_OUT.get(error.code)) from error
            wait = max(wait, min(LONGEST_WAIT, seconds_of(error.headers.get("Retry-After"))))
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        if attempt + 1 < tries and closing.wait(wait):
            break
    raise ServerError(
        f"{server.url}{path} gave no answer, {tries} times: {reason}", "start the server, or check --answers-from; --resume goes on"
    )


def said(error: urllib.error.HTTPError) -> str:
    """The server's own words, in short."""
    try:
        text = error.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        found = json.loads(text)
        text = found.get("error", found)
        text = text.get("message", text)
    except (ValueError, AttributeError):  # plain text, or JSON of another shape
        pass
    return " ".join(str(text or error.reason).split())[:300]


def seconds_of(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:  # it may be a date
        return 0.0


@dataclass(frozen=True)
class Job:
    """One prompt: what is sent, its hash, and what the target's template makes of it."""

    key: str
    body: dict
    messages: list[dict]  # for the template: arguments of earlier calls as objects
    prompt_ids: list[int]
    kind: str


def make_jobs(
    target: Target, prompts: Sequence[dict], max_tokens: int, first_seed: int, model: str, dropped: Counter
) -> list[Job]:  # fmt: skip
    jobs = []
    for index, record in enumerate(prompts):
        content = record.get("prompt") or record["messages"]
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": TEMPERATURES[index % len(TEMPERATURES)],
                "top_p": 1.0, "seed": first_seed + index}  # fmt: skip
        tools = record.get("tools") or None
        if tools:
            body["tools"] = tools
        read = for_template(messages)
        ids = target.prompt_ids(read, tools=tools)
        if tools and ids == target.prompt_ids(read):
            dropped["with tools, which the target's chat template does not write"] += 1
        elif len(ids) + max_tokens > target.max_context:
            dropped["whose prompt is too long"] += 1
        else:
            key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
            jobs.append(Job(key, body, read, ids, str(record.get("kind") or record.get("set") or "user")))
    return jobs


def ask_server(
    target: Target,
    prompts: Sequence[dict],
    max_tokens: int,
    first_seed: int,
    work: Path,
    server: Server,
    progress: Progress,
    say: Callable[[str], None],
) -> list[dict]:
    """The server's whole answers as `answer_prompts` gives the target's own: records of prompt_ids, answer_ids, temperature, kind.

    Answers that were cut, or that the template cannot write, are left out, and said. Raises `ServerError`."""
    if (work / "answers.jsonl").exists():
        return read_records(work / "answers.jsonl", ("prompt_ids", "answer_ids", "temperature", "kind"))
    dropped: Counter[str] = Counter()
    jobs = make_jobs(target, prompts, max_tokens, first_seed, server.model, dropped)
    replies = ask_all(jobs, server, work / "replies.jsonl", progress)
    dropped["refused by the server"] += len(jobs) - sum(job.key in replies for job in jobs)
    records = []
    for job in jobs:
        if job.key not in replies:
            continue
        try:
            answer = answer_ids(target, job, replies[job.key])
        except Unwritten as reason:
            dropped[str(reason)] += 1
            continue
        if len(job.prompt_ids) + len(answer) > target.max_context:
            dropped["too long for the target"] += 1
            continue
        records.append({"prompt_ids": job.prompt_ids, "answer_ids": answer, "temperature": job.body["temperature"], "kind": job.kind})
    write_records(work / "answers.jsonl", records)
    left_out = "".join(f"; {count} {reason}" for reason, count in dropped.items() if count)
    say(f"{len(records)} answers of {server.model} from {server.url}{left_out}")
    agreement = greedy_share(target, records)
    if agreement is not None and agreement < LEAST_AGREEMENT:
        say(
            f"warning: of the tokens of its greedy answers {agreement:.0%} are what the target itself would say: is {server.model} this target, "
            "with this chat template? A head learns the words of whoever answers"
        )
    return records


def ask_all(jobs: Sequence[Job], server: Server, path: Path, progress: Progress) -> dict[str, dict]:
    """The replies to these jobs by their keys: those on disk, and the others from the server, each written as it comes."""
    replies = {record["key"]: record for record in read_records(path, ("key", "finish_reason", "message"))}
    write_records(path, replies.values())  # drops a line that was being written when the run was killed
    waiting = list({job.key: job for job in jobs if job.key not in replies}.values())
    stage, refused, lock, closing = "answers from the server", 0, threading.Lock(), threading.Event()
    with path.open("a", encoding="utf-8") as file, ThreadPoolExecutor(server.concurrency) as pool:

        def ask(job: Job) -> dict:
            record = {"key": job.key, **first_choice(call(server, "/chat/completions", job.body, closing=closing))}
            with lock:  # here, so that what is under way when the run is interrupted is kept as well
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
            return record

        asked = [pool.submit(ask, job) for job in waiting]
        try:
            for done, future in enumerate(as_completed(asked), len(jobs) - len(waiting) + 1):
                try:
                    record = future.result()
                    replies[record["key"]] = record
                except Refused as error:
                    refused += 1
                    if error.status in WAYS_OUT or (refused > MOST_REFUSED and refused > done / 2):
                        raise
                progress(stage, done, len(jobs))
        finally:
            closing.set()
            pool.shutdown(wait=True, cancel_futures=True)
    return replies


def first_choice(reply: dict) -> dict:
    """Why the first answer ended, and of its message what a template may write. Raises `ServerError` if there is none."""
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        kept = {name: message[name] for name in ("content", "tool_calls", *REASONING) if message.get(name)}
        return {"finish_reason": choice.get("finish_reason"), "message": kept}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ServerError(
            f"the server's reply holds no message: {json.dumps(reply)[:200]}", "is it a server for chats? --answers-from URL"
        ) from error


def answer_ids(target: Target, job: Job, reply: dict) -> list[int]:
    """The tokens that the target generated for this reply, the end of its turn included. Raises `Unwritten`."""
    if reply["finish_reason"] == "length":
        raise Unwritten("cut at the limit of tokens")
    if reply["finish_reason"] not in WHOLE:
        raise Unwritten(f"that ended with {reply['finish_reason']!r}")
    text = written(target, job, reply["message"])
    ids = target.tokenizer(text, add_special_tokens=False).input_ids
    end = next((i + 1 for i, token in enumerate(ids) if token in target.eos_ids), len(ids))  # a template may write on
    return ids[:end]


def written(target: Target, job: Job, message: dict) -> str:
    """The text of the message, as the chat template writes it behind the prompt. Raises `Unwritten` if any of it is lost."""
    reasoning = next((message[name] for name in REASONING if message.get(name)), "")
    content, calls = message.get("content") or "", message.get("tool_calls") or []
    if not all(isinstance(text, str) for text in (reasoning, content)):
        raise Unwritten("whose content is no text")
    try:
        turn = for_template([{"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}])
        turn[0] |= dict.fromkeys(REASONING, reasoning) if reasoning else {}
        names = [call["function"]["name"] for call in calls]
        before = template(target, job, job.messages, True)
        whole = template(target, job, [*job.messages, *turn], False)
    except Exception as error:  # a template is a program of the target's maker and may raise anything
        raise Unwritten("that the target's chat template does not take") from error
    if not whole.startswith(before):
        raise Unwritten("that the target's chat template writes otherwise than it asks for them")
    text = whole[len(before) :]
    for what, parts in (("reasoning", [reasoning.strip()]), ("tool calls", names), ("content", [content.strip()])):
        if not all(part in text for part in parts):
            raise Unwritten(f"whose {what} the target's chat template does not write")
    return text


def template(target: Target, job: Job, messages: list[dict], asking: bool) -> str:
    tools = job.body.get("tools")
    return target.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=asking)


def greedy_share(target: Target, records: Sequence[dict]) -> float | None:
    """Of the tokens of some answers sampled at temperature 0: the share that the target would have chosen too. None without any."""
    agreed = total = 0
    for record in [r for r in records if r["temperature"] == 0 and r["answer_ids"]][:CHECKED]:
        answer = record["answer_ids"]
        logits_TV = target.score(target.start(), (record["prompt_ids"] + answer)[:-1], num_logits=len(answer)).logits_TV
        agreed += sum(a == b for a, b in zip(logits_TV.argmax(-1).tolist(), answer, strict=True))
        total += len(answer)
    return agreed / total if total else None
