"""What verifying a block as a whole brings over verifying it token by token, and how far two heads are apart under each rule.

    python bench/block_rule.py TARGET --prompts FILE.jsonl ... --head NAME=DIR ... [--temperature T] [--limit N] [--dtype D]

Decodes the prompts with whole blocks of each head. In every round the chance that the block stands up to each of its tokens is
computed under both rules from the same rows, so the two columns differ by the rule alone and not by luck: tokens a round are one
more than the sum of these chances. Rounds cut short by the end of the text are left out."""

import argparse
from collections import defaultdict
from pathlib import Path

import torch

from dspark.core.decode import decode, judge_fast, row_laws
from dspark.core.planner import Always
from dspark.core.sampling import Streams
from dspark.core.verifier import acceptance
from dspark.drafters import DSparkDrafter
from dspark.generation import make_law, stopping_rule
from dspark.head.folder import load_head
from dspark.prompts import read_prompts
from dspark.target.load import load_target


def chances(law, ids, draft, scored) -> tuple[list[float], list[float]]:
    """That the block stands up to each of its tokens: judged one by one, and as a whole."""
    rows = row_laws(law, ids, draft.tokens, scored.logits_TV)
    by_token, by_block = [1.0], [1.0]
    for k, token in enumerate(draft.tokens):
        by_token.append(by_token[-1] * acceptance(rows[k], draft.probs_KV[k], token))
        by_block.append(acceptance(rows[k], draft.probs_KV[k], token, by_block[-1]))
    return by_token[1:], by_block[1:]


def measure(target, head, prompts, law, max_new_tokens: int) -> dict[str, torch.Tensor]:
    """set -> [rounds, 2 rules, block size]."""
    drafter, found = DSparkDrafter(head, target), defaultdict(list)
    for seed, (name, ids) in enumerate(prompts):

        def judge(law, ids, draft, num_planned, scored, streams, name=name):
            if num_planned == drafter.block_size:
                found[name].append(chances(law, ids, draft, scored))
            return judge_fast(law, ids, draft, num_planned, scored, streams)

        for _ in decode(
            target, drafter, ids, law, Streams(seed), max_new_tokens, stopping_rule(target, target.eos_ids, ()), Always(), judge
        ):
            pass
    return {name: torch.tensor(rounds, dtype=torch.float64) for name, rounds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--head", action="append", required=True, metavar="NAME=DIR", help="the first is compared with the second")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--limit", type=int, help="prompts of each file")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    target = load_target(options.target, options.dtype)
    prompts = [(file.stem, target.prompt_ids(p.content)) for file in options.prompts for p in read_prompts(file)[: options.limit]]
    law = make_law(options.temperature, top_p=options.top_p)
    heads = dict(text.split("=", 1) for text in options.head)
    found = {name: measure(target, load_head(folder, target), prompts, law, options.max_new_tokens) for name, folder in heads.items()}
    sets = list(dict.fromkeys(name for name, _ in prompts))
    print(f"| set | {' | '.join(f'{name} by token | as a block | gain' for name in heads)} | rounds |")
    print("|---" * (2 + 3 * len(heads)) + "|")
    for name in [*sets, "all"]:
        cells, num = [], []
        for head in heads:
            rounds = torch.cat(list(found[head].values())) if name == "all" else found[head][name]
            by_token, by_block = (1 + rounds.sum(-1).mean(0)).tolist()
            cells += [f"{by_token:.3f}", f"{by_block:.3f}", f"{by_block / by_token - 1:+.1%}"]
            num.append(str(len(rounds)))
        print(f"| {name} | {' | '.join(cells)} | {', '.join(num)} |")
    for head in heads:
        by_token, by_block = torch.cat(list(found[head].values())).mean(0)
        print(f"{head}: stands up to each position, by token {rounded(by_token)}, as a block {rounded(by_block)}")
    if len(heads) > 1:
        one, other = ((1 + torch.cat(list(found[head].values())).sum(-1).mean(0)) for head in list(heads)[:2])
        by_token, by_block = (one / other - 1).tolist()
        first, second = list(heads)[:2]
        print(f"{first} over {second}: {by_token:+.1%} by token, {by_block:+.1%} as a block")


def rounded(values: torch.Tensor) -> str:
    return " ".join(f"{value:.3f}" for value in values.tolist())


if __name__ == "__main__":
    main()
