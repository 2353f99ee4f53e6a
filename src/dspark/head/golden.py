"""Golden vectors: what head and target computed when the head was saved, to be computed again at every load.

They hold a short text (a prompt and what the target says greedily after it), the tapped features of its last tokens,
and what the head makes of these at the text's end: context, hidden states, logits, a greedy draft, confidences. A
wrong file, tap or convention gives plausible text and bad drafts; here it shows, and where it begins is named.

Shapes: T tokens, W tokens with features, M tapped layers, D hidden, G block size, C columns of logits, V draft vocabulary."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dspark.errors import HeadError
from dspark.head.head import Head, SelfTest
from dspark.head.recurrent import AnyHead, RecurrentHead
from dspark.target.quantize import is_int8
from dspark.target.target import Target

NAME = "golden.safetensors"
PROMPT_TOKENS, TEXT_TOKENS = 64, 24  # at most, and exactly; the features of the last TEXT_TOKENS are kept
COLUMNS = 512  # of the draft vocabulary, evenly spread
WAY_OUT = "restore the file, or train the head again"
# Features of the target at hand against those stored: mean over tokens of cosine times ratio of lengths, of the worst layer.
SAME_TARGET, CLOSE_TARGET = 0.8, 0.97
NEEDED = {"ids", "layer_ids", "features", "logits"}


@dataclass
class Block:
    """What a head makes of one anchor, greedily."""

    hidden_GD: torch.Tensor
    logits_GV: torch.Tensor
    confidences_G: torch.Tensor | None  # logits
    tokens: list[int]


def make_golden(head: AnyHead, target: Target, ids: list[int]) -> dict[str, torch.Tensor]:
    """Golden vectors of a head in float32 on this target, on a text that begins with `ids`."""
    ids = ids[:PROMPT_TOKENS]
    num_prompt = len(ids)
    ids = [*ids, *say_greedily(target, ids, min(TEXT_TOKENS, target.max_context - num_prompt))]
    features = read_features(head, target, ids)
    stored = features[-TEXT_TOKENS:].to(torch.bfloat16)
    block = last_block(head, target, ids, stored)
    columns = torch.linspace(0, len(head.draft_ids) - 1, min(COLUMNS, len(head.draft_ids))).long()
    golden = {
        "ids": torch.tensor(ids, dtype=torch.int32),
        "layer_ids": torch.tensor(head.config.target_layer_ids, dtype=torch.int32),
        "features": stored,
        "context": head.context(stored[None].float())[0, -1].half(),
        "hidden": block.hidden_GD.half(),
        "columns": columns.int(),
        "logits": block.logits_GV[:, columns].half(),
        "draft": torch.tensor(block.tokens, dtype=torch.int32),
        "accepted": torch.tensor([count_accepted(head, target, ids, num_prompt, features), num_prompt], dtype=torch.int32),
    }
    return golden if block.confidences_G is None else golden | {"confidences": block.confidences_G}


def say_greedily(target: Target, ids: Sequence[int], num_tokens: int) -> list[int]:
    """What the target says after `ids`, end tokens and all."""
    state, tokens = target.start(), list(ids)
    said: list[int] = []
    while len(said) < num_tokens:
        scored = target.score(state, tokens, num_logits=1)
        target.rollback(state, 0)
        tokens = [int(scored.logits_TV[-1].argmax())]
        said += tokens
    return said


def read_features(head: AnyHead, target: Target, ids: Sequence[int]) -> torch.Tensor:
    """The head's taps on these tokens [T, M, D], in float32 on the CPU."""
    target.tap(head.config.target_layer_ids)
    return target.score(target.start(), ids, num_logits=1).features_TMD.float().cpu()


@torch.no_grad()
def last_block(head: AnyHead, target: Target, ids: Sequence[int], features_WMD: torch.Tensor, told: Sequence[int] | None = None) -> Block:
    """The block after the last token, which sees the features of the tokens before it that have some."""
    if isinstance(head, RecurrentHead):
        return greedy_chain(head, ids, features_WMD[:-1], told)
    start = len(ids) - len(features_WMD)
    context_kv = head.context_kv(features_WMD[None, :-1].float(), torch.arange(start, len(ids) - 1)[None])
    return greedy_block(head, target, ids[-1], len(ids) - 1, context_kv, told)


@torch.no_grad()
def greedy_block(
    head: Head, target: Target, anchor: int, position: int, context_kv, told: Sequence[int] | None = None, text: Sequence[int] | None = None
) -> Block:
    """Draft after `anchor`; the sequential head hears the tokens `told` instead of its own where they are given. With a `text`,
    nothing is drafted past the first token that is not in it."""
    embedded = target.embed(torch.tensor([[anchor]], device=target.device)).float().cpu()
    hidden_GD = head.hidden(embedded, torch.tensor([[position]]), context_kv)[0, 0]
    logits_GV = head.base_logits(hidden_GD)
    markov, state, previous = head.markov_head, None, anchor
    tokens, confidences = [], []
    for k, h_D in enumerate(hidden_GD):
        w_r = None
        if markov is not None:
            w_r = markov.markov_w1.weight[previous]
            z_r, state = markov.step(w_r, h_D, state)
            logits_GV[k] += markov.markov_w2(z_r)
        if head.confidence_head is not None:
            confidences.append(head.confidence_head(h_D, w_r))
        tokens.append(int(head.draft_ids[logits_GV[k].argmax()]))
        if text is not None and (k >= len(text) or tokens[-1] != text[k]):
            break
        previous = tokens[-1] if told is None else told[k]
    return Block(hidden_GD, logits_GV, torch.stack(confidences) if confidences else None, tokens)


@torch.no_grad()
def greedy_chain(
    head: RecurrentHead,
    ids: Sequence[int],
    features_TMD: torch.Tensor,
    told: Sequence[int] | None = None,
    text: Sequence[int] | None = None,
) -> Block:
    """`greedy_block` of a head that drafts token by token, after `ids`; the features are those of the last tokens before the anchor.
    Without any, nothing is drafted."""
    cache, reads, given = head.start(), head.hidden(features_TMD), list(ids[len(ids) - len(features_TMD) :])
    tokens: list[int] = []
    hidden, logits = [head.norm(reads[:0])], [reads.new_empty(0, len(head.draft_ids))]
    while len(reads) and len(tokens) < head.block_size:
        # only how far slots are apart matters, so the first one is 0
        states, logits_V = head.run(0, reads, given, cache.get_seq_length(), cache)
        hidden.append(head.norm(states[-1:]))
        logits.append(logits_V[None])
        tokens.append(int(head.draft_ids[logits_V.argmax()]))
        k = len(tokens) - 1
        if text is not None and (k >= len(text) or tokens[k] != text[k]):
            break
        reads, given = states[-1:], [tokens[k] if told is None else told[k]]
    return Block(torch.cat(hidden), torch.cat(logits), None, tokens)


@torch.no_grad()
def count_accepted(head: AnyHead, target: Target, ids: Sequence[int], num_prompt: int, features_TMD: torch.Tensor) -> int:
    """Of the text after the prompt, the tokens that greedy rounds would take from the head's drafts."""
    context_kv = [] if isinstance(head, RecurrentHead) else head.context_kv(features_TMD[None].float(), torch.arange(len(ids))[None])
    last, accepted = num_prompt - 1, 0
    while last < len(ids) - 1:
        text = ids[last + 1 :]
        if isinstance(head, RecurrentHead):
            tokens = greedy_chain(head, ids[: last + 1], features_TMD[:last], text=text).tokens
        else:
            seen = [(keys[:, :, :last], values[:, :, :last]) for keys, values in context_kv]
            tokens = greedy_block(head, target, ids[last], last, seen, text=text).tokens
        right = sum(a == b for a, b in zip(tokens, text, strict=False))
        accepted, last = accepted + right, last + right + 1
    return accepted


def told_by(golden: dict[str, torch.Tensor]) -> tuple[int, int] | None:
    """How many tokens of the golden text the draft gave when the head was saved, of how many; None in older golden vectors."""
    if "accepted" not in golden or golden["accepted"].shape != (2,):
        return None
    accepted, num_prompt = golden["accepted"].tolist()
    return accepted, len(golden["ids"]) - num_prompt


def replay_golden(
    head: AnyHead, target: Target, golden: dict[str, torch.Tensor], folder: Path, same_target: bool = True
) -> SelfTest | None:
    """Raise `HeadError` unless head and target still compute what they did when the head was saved; says what the head
    drafts on the golden text here. None for golden vectors of an older kind, which have no such text, and with
    `same_target=False`: then only what no weight of the target enters is computed again, the head's context."""
    missing = (NEEDED if isinstance(head, Head) else NEEDED | {"draft"}) - golden.keys()
    if missing:
        raise HeadError(f"{folder}/{NAME} lacks {', '.join(sorted(missing))}", WAY_OUT)
    if tuple(golden["layer_ids"].flatten().tolist()) != head.config.target_layer_ids:
        raise HeadError(
            f"{folder} was trained on layers {golden['layer_ids'].tolist()}, its config names {list(head.config.target_layer_ids)}",
            "restore config.json",
        )
    refuse_misshapen(golden, head, target, folder)
    refuse_other_head(head, target, golden, folder, same_target)
    if not same_target:
        return None
    ids = golden["ids"].tolist()
    features = read_features(head, target, ids)
    refuse_other_features(golden, features, head, target)
    if "accepted" not in golden:
        return None
    then, num_prompt = golden["accepted"].tolist()
    test = SelfTest(count_accepted(head, target, ids, num_prompt, features), len(ids) - num_prompt, then)
    if not test.good:
        warnings.warn(f"the head drafts badly here: {test}", stacklevel=3)
    return test


@torch.no_grad()
def refuse_other_head(head: AnyHead, target: Target, golden: dict[str, torch.Tensor], folder: Path, same_target: bool) -> None:
    """Raise `HeadError` naming the first thing that the head computes otherwise from the stored features."""
    ids, features = golden["ids"].tolist(), golden["features"]
    # fp16 storage rounds at 5e-4 relative, 8-bit rows at 1e-2; a wrong weight or tap moves values by their spread.
    most = 0.25 if is_int8(target.model.get_output_embeddings().weight) else 0.05
    told = golden["draft"].tolist() if "draft" in golden else None

    def off(found: torch.Tensor, stored: torch.Tensor) -> float:
        return ((found - stored.float()).abs().max() / stored.float().std()).item()

    def refuse_if_off(what: str, error: float) -> None:
        if not error < most:
            raise HeadError(
                f"golden vectors of {folder} do not come out again, first in {what}: off by {error:.2g} of the spread",
                "the head's files do not belong together: restore them",
            )

    if told is not None:
        refuse_if_off("the context (fc, hidden_norm)", off(head.context(features[None].float())[0, -1], golden["context"]))
    if not same_target:  # a block begins with the target's embeddings and ends with its output rows
        return
    block = last_block(head, target, ids, features, told)
    if told is None:  # golden vectors of the first kind: base logits, all columns
        assert isinstance(head, Head)  # no other kind had them
        refuse_if_off("the logits", off(head.base_logits(block.hidden_GD), golden["logits"]))
        return
    logits_GC = block.logits_GV[:, golden["columns"].long()]
    for k in range(head.config.block_size):
        of_token = f"of drafted token {k + 1}"
        refuse_if_off(f"the hidden state {of_token} (layers, norm)", off(block.hidden_GD[k], golden["hidden"][k]))
        refuse_if_off(f"the logits {of_token} (output rows, markov_head)", off(logits_GC[k], golden["logits"][k]))
        row_V, where = block.logits_GV[k], (head.draft_ids == told[k]).nonzero().flatten()
        gap = (row_V.max() - row_V[where].max()) / row_V.std() if len(where) else torch.tensor(torch.inf)
        refuse_if_off(f"the choice {of_token}, which was {told[k]} and is {block.tokens[k]}", gap.item())
        if block.confidences_G is not None:
            then = golden["confidences"][k]
            refuse_if_off(f"the confidence {of_token} (confidence_head)", ((block.confidences_G[k] - then).abs() / (1 + then.abs())).item())


def refuse_other_features(golden: dict[str, torch.Tensor], features_TMD: torch.Tensor, head: AnyHead, target: Target) -> None:
    """Raise `HeadError` when the target's features are not those stored; warn when they are near."""
    likeness_M = features_likeness(golden, features_TMD)
    name, worst = target.name or type(target.model).__name__, int(likeness_M.argmin())
    likeness = likeness_M[worst].item()
    if not likeness > SAME_TARGET:
        raise HeadError(
            f"head was trained on another target than {name}: features of layer {head.config.target_layer_ids[worst]} "
            f"agree to {likeness:.2f} only",
            f"train one for this target: `dspark train {target.name or 'TARGET'} --out DIR`",
        )
    if likeness < CLOSE_TARGET:
        warnings.warn(
            f"{name} differs from the target this head was trained on (features agree to {likeness:.2f}); expect fewer accepted tokens",
            stacklevel=4,
        )


def features_likeness(golden: dict[str, torch.Tensor], features_TMD: torch.Tensor) -> torch.Tensor:
    """How near features of the golden text are to those stored, by layer [M]: 1 where they are the same."""
    stored = golden["features"].float()
    found = features_TMD[-len(stored) :]
    lengths = torch.stack([found.norm(dim=-1), stored.norm(dim=-1)])
    # The cosine alone does not see a tap after a norm, which changes lengths.
    return (torch.cosine_similarity(found, stored, dim=-1) * lengths.amin(0) / lengths.amax(0)).mean(0)


def refuse_misshapen(golden: dict[str, torch.Tensor], head: AnyHead, target: Target, folder: Path) -> None:
    config, ids = head.config, golden["ids"]
    num_ids, whole = ids.numel(), (torch.int32, torch.int64)
    rows = len(golden["features"]) if golden["features"].dim() else 0
    wanted = {
        "ids": (num_ids,),
        "features": (rows, len(config.target_layer_ids), config.hidden_size),
        "logits": (config.block_size, config.draft_vocab_size),
    }
    new = "draft" in golden
    if new:
        columns = golden["columns"].numel() if "columns" in golden else 0
        wanted |= {"context": (config.hidden_size,), "hidden": (config.block_size, config.hidden_size), "columns": (columns,),
                   "logits": (config.block_size, columns), "draft": (config.block_size,), "accepted": (2,)}  # fmt: skip
        if config.enable_confidence_head:
            wanted["confidences"] = (config.block_size,)
    problems = [f"lacks {name}" for name in wanted if name not in golden]
    problems += [f"{n} has shape {tuple(golden[n].shape)}" for n, shape in wanted.items() if n in golden and golden[n].shape != shape]
    integers = {"ids", "layer_ids", "columns", "draft", "accepted"}
    problems += [f"{name} are not floats" for name in wanted.keys() - integers if name in golden and not golden[name].is_floating_point()]
    problems += [f"{name} are not whole numbers" for name in wanted.keys() & integers if name in golden and golden[name].dtype not in whole]
    if not problems:
        if not 1 <= num_ids <= target.max_context or not bool(((ids >= 0) & (ids < config.vocab_size)).all()):
            problems.append("ids are no tokens of this target")
        if not 1 <= rows <= num_ids or (not new and rows != num_ids):
            problems.append(f"features of {rows} tokens for {num_ids} ids")
        if new and not bool(((golden["columns"] >= 0) & (golden["columns"] < config.draft_vocab_size)).all()):
            problems.append("columns outside the draft vocabulary")
        if new and not 1 <= golden["accepted"][1] <= num_ids:
            problems.append(f"a prompt of {golden['accepted'][1]} tokens for {num_ids} ids")
    if problems:
        raise HeadError(f"{folder}/{NAME} is damaged: {'; '.join(problems)}", WAY_OUT)
    refuse_broken(golden, f"{folder}/{NAME} is damaged", WAY_OUT)


def refuse_broken(tensors: dict[str, torch.Tensor], where: str, hint: str) -> None:
    for name, tensor in tensors.items():
        # One pass without a copy: a NaN is both ends, an infinity one of them.
        if tensor.is_floating_point() and tensor.numel() and not all(map(math.isfinite, map(float, tensor.aminmax()))):
            raise HeadError(f"{where}: NaN or infinity in {name}", hint)
