"""How fast a GPU samples, computes features and trains, with random weights in the shape of SmolLM2-135M.

    python bench/gpu/times.py [--device cuda] [--out FILE.json] [--rows N] [--sequences N] [--anchors N] [--quick]

Nothing is downloaded. Sampling: `--rows` prompts of 80 tokens, 192 new ones each, none ends early. Features: the target's pass over
1,024 texts of 330 tokens with the teacher's best 32 of each. Steps: DSpark (rank 160) and DFlash (rank 0), 2 layers, block of 7, 8,192
draft tokens; the median of 20 steps after 5. Decoding: 48 tokens of one request, eagerly and with CUDA graphs. `--quick` is a shape for trying it on a CPU."""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dspark.config import TrainConfig
from dspark.generation import generate
from dspark.head.head import Head
from dspark.profiling import device_name
from dspark.target.graphs import Graphs
from dspark.target.target import Target
from dspark.train.answers import batch_size
from dspark.train.features import FeatureStore
from dspark.train.run import choose_shape
from dspark.train.sample import sample_batch
from dspark.train.trainer import train_steps
from dspark.train.warmstart import new_head

PROMPT, ANSWER = 80, 250


def random_target(device: str, quick: bool) -> Target:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=6 if quick else 30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return Target(LlamaForCausalLM(config).to(device=device, dtype=torch.bfloat16).requires_grad_(False), name="random")


def synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def sampling(target: Target, rows: int, num_new: int) -> dict:
    prompts = torch.randint(3, 49152, (rows, PROMPT)).tolist()
    sample_batch(target, prompts[:4], [1.0] * 4, 4, 0, frozenset())  # warms up
    begin = synchronized(target.device)
    sample_batch(target, prompts, [1.0] * rows, num_new, 0, frozenset())
    seconds = synchronized(target.device) - begin
    return {
        "rows": rows,
        "new_tokens": num_new,
        "seconds": seconds,
        "ms_a_step": 1e3 * seconds / num_new,
        "tokens_per_second": rows * num_new / seconds,
    }


def records(count: int) -> list[dict]:
    ids = torch.randint(3, 49152, (count, PROMPT + ANSWER), generator=torch.Generator().manual_seed(1)).tolist()
    return [
        {"prompt_ids": row[:PROMPT], "answer_ids": row[PROMPT:], "temperature": float(i % 2), "kind": "random"} for i, row in enumerate(ids)
    ]


def features(store: FeatureStore) -> dict:
    if not store.resident:
        return {"resident": False}
    store.fill(range(2))
    begin = synchronized(store.target.device)
    store.fill(range(len(store)))
    seconds = synchronized(store.target.device) - begin
    return {"resident": True, "seconds": seconds, "tokens_per_second": sum(store.lengths) / seconds}


def steps(head: Head, store: FeatureStore, config: TrainConfig, trace: bool) -> dict:
    device, ends = store.target.device, []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    train_steps(head, store.target, store, config, None, lambda step, result: ends.append(synchronized(device)))
    times = [1e3 * (b - a) for a, b in itertools.pairwise(ends[5:])]
    found = {"ms_a_step": statistics.median(times), "least": min(times), "most": max(times)}
    if device.type == "cuda":
        begin = synchronized(device)
        train_steps(head, store.target, store, config)  # without a wait after each step, as in a real run
        found["ms_a_step_unwatched"] = 1e3 * (synchronized(device) - begin) / config.steps
        found["peak_gigabytes"] = torch.cuda.max_memory_allocated(device) / 1e9
        if trace:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as kernels:
                train_steps(head, store.target, store, TrainConfig(**{**vars(config), "steps": 3}))
            print(kernels.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=60))
    return found


def decoding(target: Target, head: Head) -> dict:
    served = head.to(target.model.dtype).eval()
    prompt, found = list(range(3, 83)), {}
    for runtime in ("eager", "graph"):
        target.graphs = Graphs(target.model, record=target.device.type == "cuda") if runtime == "graph" else None
        for name in ("none", "dspark"):
            generate(target, served, prompt, 48, drafter=name, plan="fixed")  # warms up
            result = generate(target, served, prompt, 48, drafter=name, plan="fixed")
            found[f"{name}_{runtime}_ms_a_round"] = 1e3 * result.seconds / result.rounds
    target.graphs = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, help="texts sampled at once (default: what `dspark train` takes)")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--anchors", type=int, default=64)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--trace", action="store_true", help="print the kernels of three steps")
    options = parser.parse_args()
    target = random_target(options.device, options.quick)
    report: dict = {"device": device_name(target.device), "torch": torch.__version__, "arguments": vars(options) | {"out": None}}

    def note(name: str, found: dict) -> None:
        report[name] = found
        print(name, json.dumps(found), flush=True)
        if options.out:
            options.out.write_text(json.dumps(report, indent=2) + "\n")

    if target.device.type == "cuda":
        a = torch.randn(8192, 8192, device=target.device, dtype=torch.bfloat16)
        a @ a
        begin = synchronized(target.device)
        for _ in range(10):
            a @ a
        note("ceiling", {"bfloat16_tflops": 10 * 2 * 8192**3 / (synchronized(target.device) - begin) / 1e12})
    note("sampling", sampling(target, options.rows or batch_size(target, 500), 16 if options.quick else 192))
    config = TrainConfig(
        steps=7 if options.quick else 26, sequences_per_step=options.sequences, anchors_per_sequence=options.anchors, held_out=2,
        teacher_ce=True, ce_weight=1.0, l1_weight=0.5,
    )  # fmt: skip
    given = records(16 if options.quick else 1024)
    with tempfile.TemporaryDirectory() as folder:
        for rank in (160, 0):
            shape, ids = choose_shape(target, given, {"block_size": 7, "markov_rank": rank, "draft_vocab_size": 8192, "mask_token_id": 1})
            head = new_head(target, shape, ids, 0).requires_grad_(True)
            if rank:
                target.tap(shape.target_layer_ids)
                store = FeatureStore(target, given, Path(folder), 32, 1.0)
                note("features", features(store))
            note(f"steps_rank_{rank}", steps(head, store, config, options.trace and rank > 0))
            note(f"decoding_rank_{rank}", decoding(target, head))


if __name__ == "__main__":
    main()
