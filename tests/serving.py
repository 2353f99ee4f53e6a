"""What server tests serve: a small random target with a tokenizer, and the plainest engine that keeps the contract of
dspark.engine.request: one request after the other, each by the reference loop."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator

import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dspark.drafters import PromptLookup
from dspark.engine.request import Failed, Finished, Logprob, Request, Tokens
from dspark.errors import Busy
from dspark.generation import check_request, stream
from dspark.server.run import listen, url_of
from dspark.target.target import Target
from tiny import tiny_model

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
ROLES = ("<system>", "<user>", "<assistant>")
END = "<end>"


def letters_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token for each byte and a few for two; then the roles and the end."""
    pairs = [("a", "b"), ("t", "h"), ("Ġ", "t"), ("e", "r")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, *("".join(pair) for pair in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (*ROLES, END)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    fast.chat_template = template
    return fast


def letters_target(template: str | None = TEMPLATE, max_context: int = 512) -> Target:
    """Random weights that prefer ASCII letters; vocabulary rows beyond the tokenizer's; ends seldom."""
    tokenizer = letters_tokenizer(template)
    size = len(tokenizer) + 4
    end = tokenizer.convert_tokens_to_ids(END)
    model = tiny_model("llama", vocab_size=size, max_position_embeddings=max_context, eos_token_id=end)
    model.generation_config.eos_token_id = end
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz.,Ġ"]
    others = [row for row in range(size) if row not in letters]
    model.get_output_embeddings().weight[others] *= 0.1
    return Target(model, tokenizer, name="letters")


class OneAtATime:
    """Decodes requests in order. `pause` seconds pass between rounds; `fail` is raised by the next request that runs."""

    def __init__(self, target: Target, max_waiting: int = 8, pause: float = 0.0):
        self.target, self.head, self.max_waiting, self.pause = target, None, max_waiting, pause
        self.running: list[int] = []
        self.waiting: list[int] = []
        self.number = 0
        self.fail: Exception | None = None
        self.requests: list[Request] = []
        self.cancelled: set[int] = set()
        self.closing = False
        self.work: queue.Queue = queue.Queue()
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def submit(self, request: Request, on_event) -> int:
        check_request(self.target, request.prompt_ids, request.max_new_tokens, request.seed or 0, request.stop)
        if self.closing or len(self.waiting) >= self.max_waiting:
            raise Busy("no place")
        self.number += 1
        self.waiting.append(self.number)
        self.requests.append(request)
        self.work.put((self.number, request, on_event, time.monotonic()))
        return self.number

    def cancel(self, number: int) -> None:
        self.cancelled.add(number)

    def close(self, drain_seconds: float) -> None:
        self.closing = True
        self.work.put(None)
        self.thread.join(drain_seconds)
        self.cancelled.update(range(1, self.number + 1))
        self.thread.join(10)

    def serve(self) -> None:
        while (item := self.work.get()) is not None:
            number, request, on_event, begin = item
            self.waiting.remove(number)
            self.running.append(number)
            try:
                last: Finished | Failed = self.answer(number, request, on_event, begin)
            except Exception as error:
                last = Failed(error)
            self.running.remove(number)
            on_event(last)

    def answer(self, number: int, request: Request, on_event, begin: float) -> Finished:
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        ids, rounds, accepted, drafted, first, reason = list(request.prompt_ids), 0, 0, 0, 0.0, "length"
        drafter = PromptLookup(self.target.vocab_size) if request.speculate else "none"
        seed = request.seed if request.seed is not None else time.time_ns() % 2**40
        ends = self.target.eos_ids if request.eos_ids is None else request.eos_ids
        answer = stream(
            self.target, None, ids, max_new_tokens=request.max_new_tokens, law=request.law, seed=seed, drafter=drafter,
            stop=request.stop, eos_ids=ends, plan="fixed",
        )  # fmt: skip
        while number not in self.cancelled and (done := next(answer, None)) is not None:
            rounds, accepted, drafted = rounds + 1, accepted + done.num_accepted, drafted + done.num_drafted
            first = first or time.monotonic() - begin
            sources = ["accepted"] * done.num_accepted
            sources += ["plain" if not done.num_planned else "bonus" if done.num_accepted == done.num_planned else "corrected"]
            logprobs = self.logprobs(request, ids, done.tokens) if request.logprobs is not None else None
            ids += done.tokens
            on_event(Tokens(done.tokens, sources[: len(done.tokens)], logprobs))
            if self.pause:
                time.sleep(self.pause)
        new = len(ids) - len(request.prompt_ids)
        if number in self.cancelled:
            reason = "cancelled"
        elif ids[-1] in ends or new < request.max_new_tokens or any(s in self.text(ids[-new:]) for s in request.stop):
            reason = "stop"
        seconds = time.monotonic() - begin
        return Finished(reason, len(request.prompt_ids), 0, new, rounds, drafted, drafted, accepted, first, seconds, 0.0)

    def text(self, ids: list[int]) -> str:
        return self.target.tokenizer.decode(ids, skip_special_tokens=True)

    def logprobs(self, request: Request, ids: list[int], new: list[int]) -> list[Logprob]:
        logits = self.target.score(self.target.start(), [*ids, *new[:-1]], num_logits=len(new)).logits_TV
        found = logits.log_softmax(-1)
        top = found.topk(request.logprobs) if request.logprobs else None
        return [
            Logprob(float(found[k, token]), list(zip(top.indices[k].tolist(), top.values[k].tolist(), strict=True)) if top else [])
            for k, token in enumerate(new)
        ]


class Says(OneAtATime):
    """An engine whose answers are the `texts` in turn, the last one from then on, in steps of `step` tokens, up to the limit."""

    def __init__(self, target: Target, *texts: str, step: int = 3):
        super().__init__(target)
        self.texts, self.step = list(texts), step

    def answer(self, number: int, request: Request, on_event, begin: float) -> Finished:
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        whole, said = self.target.tokenizer(text, add_special_tokens=False).input_ids, 0
        ids = whole[: request.max_new_tokens]
        for at in range(0, len(ids), self.step):
            if number in self.cancelled:
                return Finished("cancelled", len(request.prompt_ids), 0, said, said, 0, 0, 0, 0.0, 0.0, 0.0)
            new = ids[at : at + self.step]
            on_event(Tokens(new, ["accepted"] * (len(new) - 1) + ["bonus"]))
            said += len(new)
        reason = "stop" if ids == whole else "length"
        return Finished(reason, len(request.prompt_ids), 2, said, said, said, said, said, 0.1, 0.2, 0.3)


@contextlib.contextmanager
def running(app) -> Iterator[str]:
    """The app on a loopback port; its URL."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    give_up = time.monotonic() + 10
    while not server.started and time.monotonic() < give_up:
        time.sleep(0.01)
    try:
        yield url_of(listener)
    finally:
        server.should_exit = True
        thread.join(10)


def wait_until(true, seconds: float = 5.0) -> bool:
    give_up = time.monotonic() + seconds
    while not true() and time.monotonic() < give_up:
        time.sleep(0.01)
    return bool(true())
