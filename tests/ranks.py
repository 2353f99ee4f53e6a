"""One of the processes of tests/test_distributed.py: trains a tiny head with the others, several ways, and writes what came out.

RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=N python tests/ranks.py FOLDER"""

import contextlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dspark.config import TrainConfig
from dspark.errors import SettingError
from dspark.target.target import Target
from dspark.train import trainer
from dspark.train.answers import resumable
from dspark.train.distributed import ALONE, Ranks, processes
from dspark.train.features import FeatureStore
from tiny import tiny_head, tiny_model

CONFIG = TrainConfig(
    steps=5, sequences_per_step=4, anchors_per_sequence=5, held_out=2, teacher_tokens=8, learning_rate=1e-2, checkpoint_seconds=0.0
)  # fmt: skip
CACHE_GIGABYTES = 1.2e-5  # a part of the answers


class Stopped(Exception):
    pass


def records(count: int = 10) -> list[dict]:
    """Answers of very different lengths: the processes' shares of a batch weigh differently."""
    generator = torch.Generator().manual_seed(3)
    make = lambda n: torch.randint(128, (n,), generator=generator).tolist()  # noqa: E731
    return [{"prompt_ids": make(3 + i % 4), "answer_ids": make(8 + 9 * (i % 3)), "temperature": 1.0, "kind": "x"} for i in range(count)]


def tiny_target() -> Target:
    target = Target(tiny_model("llama"), name="tiny")
    target.tap((0, 3))
    return target


def open_store(target: Target, folder: Path, ranks: Ranks = ALONE) -> FeatureStore:
    return ranks.one_first(lambda: FeatureStore(target, records(), folder, 8, CACHE_GIGABYTES))


def steps(target: Target, store: FeatureStore, ranks: Ranks = ALONE, checkpoint: Path | None = None, stop_at=None, **changes) -> dict:
    """Weights of a head after training in float32: in bfloat16, gradients of two halves do not add up to those of the whole."""
    head = tiny_head(target, rank=4, block_size=3)
    for parameter in head.parameters():
        parameter.requires_grad_(True)

    measured: dict = {}

    def maybe_stop(step, result):
        measured.update(ranks.whole(head).state_dict())
        if step == stop_at:
            raise Stopped

    autocast, step_batch = torch.autocast, trainer.step_batch

    def in_float32(*args):
        batch = step_batch(*args)
        return replace(batch, features_NSMD=batch.features_NSMD.float())

    torch.autocast, trainer.step_batch = lambda *args, **kwargs: contextlib.nullcontext(), in_float32
    try:
        trainer.train_steps(head, target, store, replace(CONFIG, **changes), checkpoint, maybe_stop, ranks)
    finally:
        torch.autocast, trainer.step_batch = autocast, step_batch
    assert all(torch.equal(measured[name], value) for name, value in head.state_dict().items())  # what is measured is what is saved
    return {name: value.clone() for name, value in head.state_dict().items()}


def answers(folder: Path, ranks: Ranks = ALONE) -> list[dict]:
    """Ten jobs in batches of two; a record says which batch it came from."""
    run = lambda batch, seed: [{"job": job, "seed": seed} for job in batch]  # noqa: E731
    return resumable(range(10), run, 7, folder / "answers.jsonl", lambda done: None, ("job",), 2, ranks)


def main(folder: Path) -> None:
    target = tiny_target()
    with processes("ddp", "cpu") as ranks:
        store = open_store(target, folder / "cache", ranks)
        sharded = replace(ranks, parallel="fsdp")
        results = {
            "ddp": steps(target, store, ranks),
            "fsdp": steps(target, store, sharded),
            "fsdp-muon": steps(target, store, sharded, optimizer="muon"),
        }
        mean, Ranks.mean = Ranks.mean, lambda self, value: value
        results["ddp-unweighted"] = steps(target, store, ranks)  # each process's own mean: another loss
        Ranks.mean = mean
        for name, which in (("ddp", ranks), ("fsdp", sharded)):
            with contextlib.suppress(Stopped):
                steps(target, store, which, folder / f"{name}-stopped.pt", stop_at=4)
            for use in ("resumed", "other", "alone"):  # each goes on writing to its own
                ranks.once(shutil.copy, folder / f"{name}-stopped.pt", folder / f"{name}-{use}.pt")
            results[f"{name}-resumed"] = steps(target, store, which, folder / f"{name}-resumed.pt")
        results["fsdp-from-ddp"] = steps(target, store, sharded, folder / "ddp-other.pt")
        told = {"answers": answers(folder, ranks), "filled": store.filled.tolist()}

        def refuse():
            raise SettingError("only the first process sees this", "a hint")

        try:
            ranks.once(refuse)
        except SettingError as error:
            told["error"] = str(error)
        torch.save(results, folder / f"results-{ranks.rank}.pt")
        (folder / f"told-{ranks.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
