"""Training by several processes: the same head as from one, whichever way the weights are kept, whoever goes on."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ranks as worker

HERE = Path(__file__).parent


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {name: str(number) for name, number in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths,
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder that two processes wrote, and their results."""
    folder, port = tmp_path_factory.mktemp("two"), free_port()
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), str(folder)], env=environment(rank, 2, port), stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
    return folder, [torch.load(folder / f"results-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    target = worker.tiny_target()
    return target, worker.open_store(target, tmp_path_factory.mktemp("alone") / "cache")


def furthest(one: dict, other: dict) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


ROUNDING = 2e-4  # of weights that five steps of 1e-2 moved


def test_two_processes_give_the_head_of_one(run, alone):
    one = worker.steps(*alone)
    for found in run[1]:  # all processes end with the whole head
        for name in ("ddp", "fsdp"):
            assert furthest(found[name], one) < ROUNDING
    assert furthest(run[1][0]["ddp-unweighted"], one) > 10 * ROUNDING


def test_sharded_matrices_take_muons_steps(run, alone):
    one = worker.steps(*alone, optimizer="muon")
    assert furthest(run[1][0]["fsdp-muon"], one) < 3e-3  # its products are in bfloat16
    assert furthest(one, worker.steps(*alone, optimizer="muon", steps=1)) > 3e-2


@pytest.mark.parametrize("name", ["ddp-resumed", "fsdp-resumed", "fsdp-from-ddp"])
def test_processes_go_on_from_a_checkpoint(run, alone, name):
    assert furthest(run[1][1][name], worker.steps(*alone)) < ROUNDING


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_goes_on_where_two_stopped(run, alone, name):
    checkpoint = run[0] / f"{name}-alone.pt"
    assert torch.load(checkpoint)["step"] == 3
    assert furthest(worker.steps(*alone, checkpoint=checkpoint), worker.steps(*alone)) < ROUNDING


def test_answers_are_those_of_one_process_in_its_order(run, tmp_path):
    written = (run[0] / "answers.jsonl").read_text()
    assert worker.answers(tmp_path) == json.loads((run[0] / "told-1.json").read_text())["answers"]
    assert written == (tmp_path / "answers.jsonl").read_text() and len(written.splitlines()) == 10
    (tmp_path / "answers.jsonl").write_text("".join(written.splitlines(keepends=True)[:5]))  # two killed in the third batch
    worker.answers(tmp_path)
    assert written == (tmp_path / "answers.jsonl").read_text()


def test_features_are_shared_and_never_leave_their_budget(run, alone):
    told = [json.loads((run[0] / f"told-{rank}.json").read_text()) for rank in range(2)]
    offsets = alone[1].offsets
    assert None in offsets and any(offset is not None for offset in offsets)
    # What one of the two computed, both have.
    assert told[0]["filled"] == told[1]["filled"] == [int(i >= 2 and offset is not None) for i, offset in enumerate(offsets)]
    assert sum(file.stat().st_size for file in (run[0] / "cache").iterdir()) <= worker.CACHE_GIGABYTES * 1e9


def test_an_error_of_the_first_process_is_raised_in_all(run):
    told = {json.loads((run[0] / f"told-{rank}.json").read_text())["error"] for rank in range(2)}
    assert told == {"only the first process sees this\nhint: a hint"}
