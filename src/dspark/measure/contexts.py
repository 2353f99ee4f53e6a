"""What a head drafts far into a conversation: the same questions behind more and more earlier turns.

The earlier turns are other prompts with the target's own answers. Their longest conversation is read once; the shorter ones are its
beginnings, each with a question behind it.

Shapes: T tokens, M tapped layers, D hidden."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from dspark.core.decode import Round, decode
from dspark.core.sampling import Streams
from dspark.drafters import DSparkDrafter, MtpDrafter
from dspark.errors import SettingError
from dspark.generation import generate, make_law
from dspark.head.recurrent import AnyHead
from dspark.measure.bench import by_position
from dspark.prompts import Prompt
from dspark.target.target import State, Target

ANSWER_TOKENS = 128  # of an earlier turn at most
Progress = Callable[[str, int, int], Any]  # stage, done, total


@dataclass(frozen=True)
class Reading:
    """A target as `decode` sees it when a conversation with these ids has been read already."""

    target: Target
    ids: list[int]
    state: State
    features_TMD: torch.Tensor

    def start(self) -> State:
        return self.target.start()

    def prefill(self, state: State, tokens: Sequence[int]) -> torch.Tensor:
        """What begins as the conversation does is not computed again, where the target's cache can be cut there."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, tokens, strict=False)))
        forked = self.target.fork(self.state, same)
        if forked is None:
            return self.target.prefill(state, tokens)
        state.cache, state.num_tokens = forked.cache, forked.num_tokens
        return torch.cat([self.features_TMD[:same], self.target.prefill(state, tokens[same:])])

    def score(self, state: State, tokens: Sequence[int]) -> Any:
        return self.target.score(state, tokens)

    def rollback(self, state: State, num_rejected: int) -> None:
        self.target.rollback(state, num_rejected)


def by_context(
    target: Target,
    drafter: DSparkDrafter | MtpDrafter,
    asked: Sequence[Prompt],
    turns: Sequence[list[dict]],
    lengths: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    progress: Progress = lambda stage, done, total: None,
) -> list[dict]:
    """By length of context: mean prompt tokens, tokens a round (tau) and acceptance by position, all drafted tokens verified.

    Every prompt in `asked` is asked behind as many of the `turns` (`answered`) as keep it within each length, ascending. Raises
    `SettingError` for a length that the target's context does not hold, and for one that the turns do not fill or a question alone
    exceeds."""
    check_lengths(target, asked, lengths, max_new_tokens)
    law = make_law(temperature)
    drafter.tap()
    found: dict[int, list[tuple[int, list[Round]]]] = {length: [] for length in lengths}
    stop = lambda new_ids: new_ids[-1] in target.eos_ids  # noqa: E731
    read = reading(target, conversations(target, asked[0], turns, lengths[-1:])[0])
    for i, prompt in enumerate(asked):
        prompts = conversations(target, prompt, turns, lengths)
        for length, ids in zip(lengths, prompts, strict=True):
            rounds = list(decode(read, drafter, ids, law, Streams(i), max_new_tokens, stop))
            found[length].append((len(ids), rounds))
        progress("questions", i + 1, len(asked))
    return [figures(length, each) for length, each in found.items()]


def check_lengths(target: Target, asked: Sequence[Prompt], lengths: Sequence[int], max_new_tokens: int) -> None:
    """Raise `SettingError` for a longest length that the target's context does not hold, or a shortest that a question alone exceeds."""
    if lengths[-1] + max_new_tokens > target.max_context:
        raise SettingError(
            f"{lengths[-1]} tokens and {max_new_tokens} new ones do not fit the target's context of {target.max_context}",
            f"the longest that does is {target.max_context - max_new_tokens}",
        )
    longest = max(len(target.prompt_ids(question(prompt))) for prompt in asked)
    if longest > lengths[0]:
        raise SettingError(
            f"a question of {longest} tokens is longer than a context of {lengths[0]}", "ask for longer contexts, or leave it out"
        )


def reading(target: Target, ids: list[int]) -> Reading:
    state = target.start()
    return Reading(target, ids[:-1], state, target.prefill(state, ids[:-1]))


def conversations(target: Target, prompt: Prompt, turns: Sequence[list[dict]], lengths: Sequence[int]) -> list[list[int]]:
    """The prompt's ids in a context of each length."""
    return [behind(target, question(prompt), turns, length) for length in lengths]


def question(prompt: Prompt) -> list[dict]:
    return [{"role": "user", "content": prompt.content}] if isinstance(prompt.content, str) else list(prompt.content)


def figures(length: int, each: Sequence[tuple[int, list[Round]]]) -> dict:
    rounds = [done for _, of_prompt in each for done in of_prompt]
    proposed, accepted = by_position(rounds)
    return {
        "context": length,
        "prompts": len(each),
        "prompt_tokens": round(sum(count for count, _ in each) / len(each)),
        "rounds": len(rounds),
        "tau": round(sum(len(done.tokens) for done in rounds) / len(rounds), 3),
        "acceptance_by_position": [round(a / p, 3) if p else None for p, a in zip(proposed, accepted, strict=True)],
    }


def behind(target: Target, chat: list[dict], turns: Sequence[list[dict]], length: int) -> list[int]:
    """The chat behind the first of those turns that fit, at most `length` tokens."""
    before: list[dict] = []
    ids = target.prompt_ids(chat)
    for turn in turns:
        longer = target.prompt_ids([*before, *turn, *chat])
        if len(longer) > length:
            break
        before, ids = [*before, *turn], longer
    if len(ids) < length / 2 and len(turns) * 2 == len(before):
        raise SettingError(f"the prompts fill {len(ids)} of {length} tokens", "give more prompts, or ask for shorter contexts")
    return ids


def answered(target: Target, head: AnyHead, prompts: Sequence[Prompt], num_tokens: int, progress: Progress) -> list[list[dict]]:
    """Turns of these prompts with the target's own greedy answers, until they have so many tokens."""
    turns, total = [], 0
    for prompt in prompts:
        if total >= num_tokens:
            break
        if not isinstance(prompt.content, str):
            continue
        ids = target.prompt_ids(prompt.content)
        if len(ids) + ANSWER_TOKENS > target.max_context:
            continue
        answer = generate(target, head, ids, ANSWER_TOKENS, plan="fixed")
        turns.append([{"role": "user", "content": prompt.content}, {"role": "assistant", "content": answer.text}])
        total += len(ids) + answer.num_tokens
        progress("earlier turns", min(total, num_tokens), num_tokens)
    if not turns:
        raise SettingError("no prompts are left for the turns before the questions", "give more prompts, or a lower --limit")
    return turns


def context_table(rows: Sequence[dict]) -> str:
    lines = [f"{'context':>8} {'prompts':>8} {'tokens':>7} {'rounds':>7} {'tau':>6}  acceptance by position"]
    for row in rows:
        accepted = " ".join("  - " if a is None else f"{a:.2f}" for a in row["acceptance_by_position"])
        lines.append(f"{row['context']:>8} {row['prompts']:>8} {row['prompt_tokens']:>7} {row['rounds']:>7} {row['tau']:>6.2f}  {accepted}")
    return "\n".join(lines)
