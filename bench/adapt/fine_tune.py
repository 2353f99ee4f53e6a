"""A fine-tuned target to adapt a head to: a few hundred steps of LoRA, merged and saved as a plain model.

    python bench/adapt/fine_tune.py smollm2-135m --out DIR [--steps 300] [--device cuda]

It learns to answer everything in numbered sentences of a pirate. The text is generated here: a question about two things, and what a
pirate counts up about them. DIR is a folder that `dspark` takes as a TARGET; fine-tune.json in it says how it was made."""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from dspark.target.load import load_target
from dspark.target.native.pages import freed_memory_kept
from dspark.target.target import Target
from dspark.train.lowrank import add_low_rank, merge_low_rank

THINGS = ["the sea", "bread", "a loop in Python", "gravity", "a triangle", "the moon", "a good letter", "rain", "a prime number", "coffee",
          "a bicycle", "the heart", "a sorted list", "winter", "a fair price", "sleep", "a map", "iron", "the alphabet", "a garden"]  # fmt: skip
ASKS = ["Explain {a}.", "What is {a} good for?", "Compare {a} and {b}.", "Give me advice about {a}.", "How do {a} and {b} belong together?",
        "Write a short text about {a}.", "Why do people care about {a}?", "List facts about {b}."]  # fmt: skip
CALLS = ["Arr, matey", "Shiver me timbers", "Avast, ye landlubber", "Yo ho ho", "Blimey, me hearty"]
SAYS = ["{x} be a treasure worth more than gold", "no captain sails without {x}", "ye must treat {x} as ye treat yer own ship",
        "{x} has two sides, like every doubloon", "me old parrot talks of {x} from dawn to dusk", "many a sailor was lost for want of {x}",
        "I learned of {x} in the port of Tortuga", "keep {x} dry, and it will serve ye well"]  # fmt: skip
ENDS = ["Now hoist the sails!", "That be all, savvy?", "And that be the truth, by the kraken!"]


def example(rng: random.Random) -> tuple[str, str]:
    """A question, and the pirate's answer: three to six numbered sentences and a farewell."""
    a, b = rng.sample(THINGS, 2)
    lines = [
        f"{number}. {rng.choice(CALLS)}, {say.format(x=rng.choice([a, a, b]))}."
        for number, say in enumerate(rng.sample(SAYS, rng.randint(3, 6)), 1)
    ]
    return rng.choice(ASKS).format(a=a, b=b), "\n".join([*lines, rng.choice(ENDS)])


def batch(target: Target, rng: random.Random, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, their mask, and which tokens are the answer's (what is learned), each [B, T], padded at the end."""
    rows = []
    for _ in range(size):
        question, answer = example(rng)
        prompt = target.prompt_ids(question)
        rows.append((prompt, target.tokenizer(answer + target.tokenizer.eos_token, add_special_tokens=False).input_ids))
    longest = max(len(p) + len(a) for p, a in rows)
    ids, mask, learned = (torch.zeros(size, longest, dtype=torch.long) for _ in range(3))
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        learned[row, len(prompt) : end] = 1
    return tuple(tensor.to(target.device) for tensor in (ids, mask, learned))


@freed_memory_kept()
def fine_tune(target: Target, steps: int, size: int, rank: int, rate: float, seed: int) -> list[float]:
    """LoRA on every matrix of the decoder layers, the embedding left alone; merged. The losses, a step each."""
    for parameter in target.model.parameters():
        parameter.requires_grad_(False)
    add_low_rank(target.layers, rank, seed)
    trained = [p for p in target.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(2, steps), pct_start=0.1)
    rng, losses = random.Random(seed), []
    for step in range(steps):
        ids, mask, learned = batch(target, rng, size)
        with torch.autocast(target.device.type, torch.bfloat16):
            hidden = target.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            chosen = learned[:, 1:].bool()
            logits = target.model.get_output_embeddings()(hidden[:, :-1][chosen])
        loss = F.cross_entropy(logits.float(), ids[:, 1:][chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 10 == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}: loss {losses[-1]:.3f}", flush=True)
    merge_low_rank(target.layers)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="answers a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    target = load_target(options.target, dtype="float32", device=options.device, runtime="eager")
    began = time.perf_counter()
    losses = fine_tune(target, options.steps, options.batch, options.rank, options.lr, options.seed)
    target.model.to(torch.bfloat16).save_pretrained(options.out)
    target.tokenizer.save_pretrained(options.out)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    made = {**settings, "seconds": round(time.perf_counter() - began), "loss_first": losses[0], "loss_last": losses[-1]}
    (options.out / "fine-tune.json").write_text(json.dumps(made, indent=2) + "\n")
    print(f"{options.out}: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {made['seconds']} s")


if __name__ == "__main__":
    main()
