"""Training by several processes: the same head as from one, whichever way the weights are kept, whoever goes on."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ranks as worker
from dspark.cli.main import main
from saved import save_tiny_target

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
    assert furthest(one, worker.steps(*alone, optimizer="muon", steps=1)) > 2e-2


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


# The command, under torchrun -------------------------------------------------------------

SETTINGS = [
    "--dtype=float32", "--runtime=eager", "--threads=1", "--num-prompts=10", "--held-out=2", "--max-answer-tokens=16", "--steps=12",
    "--sequences=2", "--anchors=6", "--layers=1", "--block-size=3", "--rank=4", "--draft-vocab=260", "--lr=1e-3",
]  # fmt: skip


def torchrun(size: int, *arguments: str, at_step_6: str = "", restarts: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", f"--max-restarts={restarts}"]
    command.append(str(HERE / "ended.py"))
    settings = environment(0, 1, 0) | {"AT_STEP_6": at_step_6}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        del settings[name]
    return subprocess.run(
        [*command, "train", *arguments], env=settings, capture_output=True, text=True, timeout=280, check=False, start_new_session=True
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A target's folder, and a head that one process trained for it."""
    folder = tmp_path_factory.mktemp("straight")
    target = str(save_tiny_target(folder / "target"))
    done = torchrun(1, target, "--out", str(folder / "one"), *SETTINGS)
    assert done.returncode == 0, done.stderr
    return target, load_file(folder / "one" / "model.safetensors")


def same_head(one: dict, other: dict) -> bool:
    """Within what bfloat16 makes of gradients that are added in another order."""
    apart = [(one[name].float() - other[name].float()).abs() for name in one if name != "draft_ids"]
    return all(each.max() < 1e-2 and each.mean() < 1e-4 for each in apart)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_killed_process_ends_the_run_which_then_goes_on(straight, tmp_path, parallel):
    target, one = straight
    out = tmp_path / "head"
    ended = torchrun(2, target, "--out", str(out), *SETTINGS, "--parallel", parallel, at_step_6="killed")
    assert ended.returncode and torch.load(out / "progress" / "checkpoint.pt")["step"] == 6
    assert ended.stderr.count("error:") <= 1 and not (out / "model.safetensors").exists()
    again = torchrun(2, target, "--out", str(out), "--resume", "--threads", "1", "--parallel", parallel)
    assert again.returncode == 0, again.stderr
    assert same_head(load_file(out / "model.safetensors"), one)
    assert again.stdout.count("head saved in") == 1 and again.stderr.count("may be deleted now") == 1
    provenance = json.loads((out / "provenance.json").read_text())
    assert (provenance["processes"], provenance["parallel"]) == (2, parallel) and len(provenance["curve"]) == 12


@pytest.mark.slow
def test_a_run_that_torchrun_starts_again_resumes_by_itself(straight, tmp_path):
    target, one = straight
    done = torchrun(2, target, "--out", str(tmp_path / "head"), *SETTINGS, at_step_6="killed", restarts=1)
    assert done.returncode == 0, done.stderr
    assert same_head(load_file(tmp_path / "head" / "model.safetensors"), one)


@pytest.mark.slow
def test_ctrl_c_is_told_once_and_one_process_goes_on(straight, tmp_path):
    target, one = straight
    out = tmp_path / "head"
    ended = torchrun(2, target, "--out", str(out), *SETTINGS, at_step_6="interrupted")
    assert ended.returncode and ended.stderr.count("interrupted\n") == 1 and "error:" not in ended.stderr, ended.stderr
    again = torchrun(1, target, "--out", str(out), "--resume", "--threads", "1")
    assert again.returncode == 0, again.stderr
    assert same_head(load_file(out / "model.safetensors"), one)


@pytest.mark.slow
def test_errors_are_told_once_and_name_the_way_out(straight, tmp_path):
    target, _ = straight
    odd = torchrun(2, target, "--out", str(tmp_path / "odd"), *SETTINGS, "--sequences", "3")
    assert odd.stderr.count("error: 2 processes cannot share the 3 answers of a step evenly\nhint: use --sequences 4") == 1
    assert not (tmp_path / "odd").exists()
    lone = torchrun(2, target, "--out", str(tmp_path / "lone"), *SETTINGS, at_step_6="refused")
    assert lone.stderr.count("error: this process alone has an error") == lone.stderr.count("error:") == 1


def test_parallel_needs_torchrun(tmp_path, capsys):
    assert main(["train", "nothing", "--out", str(tmp_path / "out"), "--parallel", "fsdp"]) == 2
    assert "torchrun --nproc-per-node N -m dspark train" in capsys.readouterr().err


def test_adapting_refuses_to_be_several_processes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["adapt", "nothing", "--target", "nothing", "--out", str(tmp_path / "out")]) == 2
    assert "runs in one process" in capsys.readouterr().err
