"""`dspark verify`: is the output of this target with this head, on this machine, what the target alone says?

Three questions, asked of the real pair: are greedy tokens those of plain decoding (and where
not, were the two logits a near-tie that row-count dependent kernels broke differently); does
roll-back restore the state; is the law of a sampled round the target's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from dspark.config import MAX_BLOCK
from dspark.core.sampling import probs
from dspark.core.verifier import acceptance, ending, residual, stands
from dspark.generation import generate, make_drafter, make_law, make_planner
from dspark.head.head import SelfTest
from dspark.head.recurrent import AnyHead
from dspark.target.target import Target

# Largest difference between the two best logits that counts as a tie, in units of the target's
# precision: the same row computed in a pass of another length differs by a few of these.
TIE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
LAW_PROMPTS = 4
NOTHING_DRAFTED = "nothing was drafted on these prompts; --prompts takes others"
NEVER_DRAFTS = "this drafter never drafts: there is nothing to compare"
Item = TypeVar("Item")
Progress = Callable[[str, int, int], None]  # stage, done, total


def silent(stage: str, done: int, total: int) -> None:
    """For who wants no progress."""


@dataclass(frozen=True)
class Check:
    """One line of the report; `detail` says what was compared and how far apart it was. `passed` is None where
    nothing was there to compare."""

    name: str
    passed: bool | None
    detail: str


def verify_pair(
    target: Target,
    head: AnyHead | None,
    prompts: Sequence[list[int]],
    max_new_tokens: int = 64,
    drafters: Sequence[str] = (),
    progress: Progress = silent,
) -> list[Check]:
    """Run all checks; none may fail for `dspark verify` to exit 0. `progress` hears of each what it is, and how much of it is done, of how much."""
    own = [] if head is None else [head.kind, "auto"]
    names = list(drafters) or [*own, "lookup"]
    checks = [] if head is None or head.self_test is None else [golden_text(head.self_test)]
    for name in names:
        checks.append(greedy_tokens(target, head, prompts, max_new_tokens, name, progress))
        if name != "auto":  # its drafts are those of the other two
            checks.append(round_law(target, head, prompts[:LAW_PROMPTS], name, progress=progress))
    checks.append(roll_back(target, prompts[0], progress=progress))
    checks.append(replay(target, head, prompts[0], names[0], progress))
    return checks


def counted(items: Sequence[Item], stage: str, progress: Progress) -> Iterator[Item]:
    """The items, each told when it is done."""
    progress(stage, 0, len(items))
    for done, item in enumerate(items, 1):
        yield item
        progress(stage, done, len(items))


def golden_text(test: SelfTest) -> Check:
    """Loading has compared the golden vectors; what is left is whether drafts are still worth as much."""
    return Check("golden vectors come out again", test.good, str(test))


def greedy_tokens(
    target: Target, head: AnyHead | None, prompts: Sequence[list[int]], max_new_tokens: int, drafter: str, progress: Progress = silent
) -> Check:
    same = num_drafted = 0
    chosen = make_drafter(drafter, target, head)
    plan = make_planner("auto" if drafter == "auto" else "fixed", target, chosen)
    ties: list[str] = []
    wrong: list[str] = []
    for index, ids in enumerate(counted(prompts, f"greedy tokens, drafter {drafter}", progress)):
        plain = generate(target, None, ids, max_new_tokens, drafter="none").token_ids
        result = generate(target, head, ids, max_new_tokens, drafter=chosen, plan=plan)
        drafted = result.token_ids
        num_drafted += sum(r.num_planned for r in result.rounds_log)
        first = first_difference(plain, drafted)
        if first is None:
            same += 1
            continue
        gap = logit_gap(
            target, [*ids, *plain[:first]], plain[first] if first < len(plain) else None, drafted[first] if first < len(drafted) else None
        )
        (ties if gap <= TIE[target.model.dtype] else wrong).append(f"prompt {index} token {first}: logits {gap:.2g} apart")
    detail = f"{same} of {len(prompts)} prompts identical, {num_drafted} drafted tokens judged" if num_drafted else nothing(drafter)
    if ties:
        detail += f"; near-ties: {'; '.join(ties)}"
    if wrong:
        detail += f"; DIFFERENT: {'; '.join(wrong)}"
    return Check(f"greedy tokens equal plain decoding ({drafter})", not wrong if num_drafted or wrong else None, detail)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    return next((i for i in range(max(len(a), len(b))) if i >= len(a) or i >= len(b) or a[i] != b[i]), None)


def logit_gap(target: Target, prefix: list[int], one: int | None, other: int | None) -> float:
    """Distance of the two tokens' logits after `prefix`; infinite when one text simply ended."""
    if one is None or other is None:
        return float("inf")
    state = target.start()
    target.prefill(state, prefix[:-1])
    logits = target.score(state, prefix[-1:]).logits_TV[0]
    return abs(logits[one] - logits[other]).item()


def round_law(
    target: Target, head: AnyHead | None, prompts: Sequence[list[int]], drafter: str, num_drafts: int = 8, progress: Progress = silent
) -> Check:
    """For real drafts at T = 1, at every drafted position: what drafts bring of each token there and what the residual adds must be p,
    times the chance that the block stands so far.

    This is an identity of the verifier on the pair's own p and q, in float64; it fails if a
    draft's stated law is not a law, or if it puts weight where the token could not have come from. A prompt said twice
    is one more text: few prompts end in what they held before, which is what prompt lookup drafts from."""
    law = make_law(temperature=1.0)
    worst, drawn_ok, num_positions = 0.0, True, 0
    generator = torch.Generator().manual_seed(0)
    twice = [[*ids, *ids] for ids in prompts if 2 * len(ids) + MAX_BLOCK <= target.max_context]
    for ids in counted([*prompts, *twice[:1]], f"law of a round, drafter {drafter}", progress):
        state, engine = target.start(), make_drafter(drafter, target, head)
        engine.start()
        engine.commit(target.prefill(state, ids[:-1]))
        for _ in range(num_drafts):
            draft = engine.draft(ids, engine.block_size, law, generator)
            if not draft.tokens:
                continue
            p_KV = probs(law, [()], target.score(state, [ids[-1], *draft.tokens]).logits_TV.double())
            target.rollback(state, 1 + len(draft.tokens))
            standing = 1.0
            for k, token in enumerate(draft.tokens):
                q = draft.probs_KV[k].double()
                drawn_ok &= bool(q[token] > 0) and abs(q.sum().item() - 1) < 1e-5
                q = q / q.sum()
                worst = max(worst, law_error(p_KV[k], q, standing))
                standing = acceptance(p_KV[k], q, token, standing) if q[token] > 0 else 0.0
                num_positions += 1
    return Check(
        f"law of a round at T=1 ({drafter})",
        drawn_ok and worst < 1e-12 if num_positions else None,
        f"largest error {worst:.1e} over {num_positions} drafted tokens" if num_positions else nothing(drafter),
    )


def nothing(drafter: str) -> str:
    """Why there is nothing to compare."""
    if drafter == "none":
        return NEVER_DRAFTS
    return f"{NOTHING_DRAFTED} (lookup needs texts that repeat themselves)" if drafter == "lookup" else NOTHING_DRAFTED


def law_error(p_V: torch.Tensor, q_V: torch.Tensor, standing: float = 1.0) -> float:
    """How far what comes of drawing the next token from q, where a block stands so far with chance `standing`, is from p that often."""
    kept_V, drawn = torch.zeros_like(p_V), q_V > 0
    kept_V[drawn] = q_V[drawn] * stands(p_V[drawn], q_V[drawn], standing)
    replaced_V = (1 - kept_V.sum()) * ending(p_V, q_V, standing) * residual(p_V, q_V, standing)
    return (kept_V + replaced_V - standing * p_V).abs().max().item()


def roll_back(target: Target, ids: list[int], block: int = 5, progress: Progress = silent) -> Check:
    """Score wrong tokens, roll all or some back, and compare the next logits with a state that never saw them.

    A third state that was never rolled back reads the same tokens one a pass: what it differs by is rounding of this runtime, in
    kernels that depend on the number of rows, and twice that is allowed."""
    worst = rounding = 0.0
    wrong = [(ids[-1] + 1 + i) % target.vocab_size for i in range(block)]
    for kept in counted(range(block + 1), "roll-back", progress):
        tried, straight, single = target.start(), target.start(), target.start()
        for state in (tried, straight, single):
            target.prefill(state, ids[:-1])
        target.score(tried, [ids[-1], *wrong])
        target.rollback(tried, block - kept)
        target.score(straight, [ids[-1], *wrong[:kept]])
        target.rollback(straight, 0)
        for token in [ids[-1], *wrong[:kept]]:
            target.score(single, [token])
            target.rollback(single, 0)
        after, expected, other = (target.score(state, ids[:1]).logits_TV for state in (tried, straight, single))
        worst = max(worst, (after - expected).abs().max().item())
        rounding = max(rounding, (other - expected).abs().max().item())
    tolerance = max(TIE[target.model.dtype], 2 * rounding)
    return Check("roll-back restores the state", worst <= tolerance, f"largest logit difference {worst:.1e} (tolerance {tolerance:g})")


def replay(target: Target, head: AnyHead | None, ids: list[int], drafter: str, progress: Progress = silent) -> Check:
    answers = [
        generate(target, head, ids, 24, temperature=1.0, seed=7, drafter=drafter, plan="fixed").token_ids
        for _ in counted(range(2), "replay", progress)
    ]
    return Check("a seed replays", answers[0] == answers[1], f"{len(answers[0])} sampled tokens, twice")
