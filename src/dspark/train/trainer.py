"""The training loop: batch, loss, step, checkpoint."""

import os
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dspark.config import WINDOW_STEP, HeadConfig, TrainConfig
from dspark.errors import HeadError, SettingError
from dspark.head.recurrent import AnyHead, RecurrentHead
from dspark.target.native.pages import freed_memory_kept
from dspark.target.target import Target
from dspark.train.batch import Batch, draw_batch, make_batch
from dspark.train.distributed import ALONE, Ranks, gathered, sharded_like, unsharded
from dspark.train.features import FeatureStore
from dspark.train.loss import Losses, greedy_agreement, itself, losses
from dspark.train.optimizer import make_optimizers, set_learning_rate

LOOK_EVERY = 20  # on a GPU: steps between looks at the loss, since each look waits for the GPU
MeanTotal = Callable[[torch.Tensor], torch.Tensor]
COMPILE = True  # on a GPU: most of an eager step are casts, norms and masks, which the compiler joins


@freed_memory_kept()
def train_steps(
    head: AnyHead,
    target: Target,
    store: FeatureStore,
    config: TrainConfig,
    checkpoint: Path | None = None,
    on_step: Callable[[int, Losses], None] = lambda step, result: None,
    ranks: Ranks = ALONE,
) -> AnyHead:
    """Train `head` in place for `config.steps` steps over every record but the first `held_out` ones.

    Which answers and anchors a step sees depends on (seed, step) alone, so a run resumed from
    its checkpoint continues as if it had never stopped. A kill loses at most
    `config.checkpoint_seconds` of work. The head must be on the target's device. Several processes (`ranks`) share each batch."""
    look_every = 1 if target.device.type == "cpu" else LOOK_EVERY
    loss = ranks.wrap(head, partial(loss_function(target.device), mean_total=ranks.mean))
    optimizers = make_optimizers(head, config)  # of the shards, where it is sharded now
    index = draft_index(head)
    step = load_checkpoint(checkpoint, head, optimizers) if checkpoint else 0
    saved = time.monotonic()
    head.train()
    while step < config.steps:
        set_learning_rate(optimizers, step, config)
        batch = told(head, step_batch(store, config, step, trained_steps(head), ranks.share(config.sequences_per_step)))
        result = loss(head, known_states(head, target, batch), batch, index, config)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        if step % look_every == 0:
            refuse_diverged("loss", step + 1, [result.total])
        result.total.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        on_step(step, result)
        if checkpoint and (step == config.steps or ranks.once(passed, saved, config.checkpoint_seconds)):
            state = unsharded({"step": step, "head": head.state_dict(), "optimizers": [o.state_dict() for o in optimizers]})
            refuse_diverged("head", step, state["head"].values())  # the last good checkpoint stays
            ranks.once(save_checkpoint, checkpoint, state)
            saved = time.monotonic()
    return gathered(head).eval() if ranks.shards else head.eval()


def passed(since: float, seconds: float) -> bool:
    return time.monotonic() - since > seconds


def refuse_diverged(what: str, step: int, tensors: Iterable[torch.Tensor]) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise SettingError(
            f"training diverged: the {what} of step {step} is no longer a number",
            "use a lower --lr (with muon: or --muon-lr) in another --out; `--answers DIR/progress/answers.jsonl` spares sampling again",
        )


def trained_steps(head: AnyHead) -> int:
    """Tokens after an anchor that a step trains on."""
    return head.config.trained_steps if isinstance(head, RecurrentHead) else head.config.block_size


def told(head: AnyHead, batch: Batch) -> Batch:
    """The batch without what the head can say nothing about: a recurrent head needs a state before the anchor."""
    if not isinstance(head, RecurrentHead):
        return batch
    return replace(batch, valid_NAG=batch.valid_NAG & (batch.anchors_NA > 0)[..., None])


def forward(head: AnyHead, target: Target, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits and confidence logits of a batch, matrix products in bfloat16."""
    return logits_after(head, known_states(head, target, batch), batch)


@torch.no_grad()
def known_states(head: AnyHead, target: Target, batch: Batch) -> torch.Tensor:
    """Embeddings of the tokens that a head reads: the anchors [N, A, D], or of a recurrent head the token after each of the context,
    and then those within the chains [N, S + A J, D]."""
    if not isinstance(head, RecurrentHead):
        return anchor_states(target, batch)
    return target.embed(torch.cat([batch.following_NS, batch.previous_NAG[:, :, 1:].flatten(1)], dim=1)).float()


@torch.no_grad()
def anchor_states(target: Target, batch: Batch) -> torch.Tensor:
    return target.embed(batch.previous_NAG[:, :, 0]).float()


def logits_after(
    head: AnyHead, known: torch.Tensor, batch: Batch, detached_confidence: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    device, S = known.device, batch.features_NSMD.shape[1]
    with torch.autocast(device.type, torch.bfloat16):
        if isinstance(head, RecurrentHead):
            N, A, G = batch.previous_NAG.shape
            inside = known[:, S:].unflatten(1, (A, G - 1)) if G > 1 else known.new_empty(N, A, 0, known.shape[-1])
            return head.logits(head.unroll(batch.features_NSMD, known[:, :S], inside, batch.anchors_NA, batch.visible_NAS)), None
        context_kv = head.context_kv(batch.features_NSMD, torch.arange(S, device=device)[None])
        h = head.hidden(known, batch.anchors_NA, context_kv, within_window(batch, head.config))
        return head(h, batch.previous_NAG, detached_confidence)


def within_window(batch: Batch, config: HeadConfig) -> torch.Tensor:
    """[N, A, S] the context that each block sees, as `HeadConfig.first_seen` cuts it."""
    if not config.window:
        return batch.visible_NAS
    first_NA = (batch.anchors_NA - config.window).clamp_min(0) // WINDOW_STEP * WINDOW_STEP
    return batch.visible_NAS & (torch.arange(batch.visible_NAS.shape[-1], device=first_NA.device) >= first_NA[..., None])


def loss_after(
    head: AnyHead, known: torch.Tensor, batch: Batch, index: torch.Tensor, config: TrainConfig, mean_total: MeanTotal = itself
) -> Losses:
    return losses(*logits_after(head, known, batch, config.detached_confidence), batch, index, config, mean_total)


def loss_function(device: torch.device) -> Callable[..., Losses]:
    """`loss_after`, on a GPU compiled; as it is where the compiler does not work."""
    if device.type != "cuda" or not COMPILE:
        return loss_after
    compiled = torch.compile(loss_after)
    working = True

    def loss(
        head: AnyHead, known: torch.Tensor, batch: Batch, index: torch.Tensor, config: TrainConfig, mean_total: MeanTotal = itself
    ) -> Losses:
        nonlocal working
        if working:
            head.rotary.move(known.device)  # not within what is compiled
            torch._dynamo.maybe_mark_dynamic(batch.features_NSMD, 1)
            torch._dynamo.maybe_mark_dynamic(batch.visible_NAS, 2)
            if isinstance(head, RecurrentHead):
                torch._dynamo.maybe_mark_dynamic(known, 1)
            try:
                return compiled(head, known, batch, index, config, mean_total)
            except Exception as error:  # a compiler raises anything: no C compiler, no Triton, a graph it cannot take
                working = False
                warnings.warn(f"training without torch.compile: {(str(error).splitlines() or [type(error).__name__])[0]}", stacklevel=2)
        return loss_after(head, known, batch, index, config, mean_total)

    return loss


def step_batch(store: FeatureStore, config: TrainConfig, step: int, block_size: int, share: slice = slice(None)) -> Batch:
    """The batch of one step, or a share of it: sequences in a new order each epoch, anchors drawn anew each step."""
    train = len(store) - config.held_out
    first = step * config.sequences_per_step
    orders: dict[int, torch.Tensor] = {}
    chosen = []
    for position in range(first, first + config.sequences_per_step):
        epoch = position // train
        if epoch not in orders:
            orders[epoch] = torch.randperm(train, generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch))
        chosen.append(config.held_out + int(orders[epoch][position % train]))
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + 500_000 + step)
    return draw_batch(store, chosen, config.anchors_per_sequence, block_size, generator, share)


@torch.no_grad()
def measure(head: AnyHead, target: Target, store: FeatureStore, config: TrainConfig, count: int) -> dict:
    """Expected tau on held-out answers with the real tokens as prefix: `tau_t1` from overlaps, `tau_t0`
    from runs of greedy agreement, each over the answers sampled at that temperature; and by position
    the acceptance given that all before it were accepted. Decoding rounds decide; this is the quick look."""
    was_training = head.training
    head.eval()
    index = draft_index(head)
    runs: dict[float, list[torch.Tensor]] = {0.0: [], 1.0: []}
    for i in range(min(count, config.held_out)):
        temperature = store.records[i]["temperature"]
        if temperature not in runs:
            continue
        sample = store[i]
        batch = told(head, make_batch([sample], len(sample.teacher_ids_nP), head.config.block_size, None).to(target.device))
        logits, confidence = forward(head, target, batch)
        if temperature == 0:
            accepted = greedy_agreement(logits, batch, index).float()
        else:
            accepted = losses(logits, confidence, batch, index, config).overlap_NAG
        whole = batch.valid_NAG[0].all(-1)  # a block that the answer's end cuts says nothing about its last positions
        runs[temperature].append(accepted[0, whole].cumprod(-1))
    head.train(was_training)
    report: dict = {}
    for temperature, parts in runs.items():
        if sum(len(part) for part in parts):
            survival = torch.cat(parts).mean(0)
            before = torch.cat([survival.new_ones(1), survival[:-1]])
            name = f"t{temperature:.0f}"
            report[f"tau_{name}"] = 1 + survival.sum().item()
            report[f"acceptance_{name}"] = [round(a, 3) for a in (survival / before.clamp_min(1e-9)).tolist()]
    return report


def draft_index(head: AnyHead) -> torch.Tensor:
    """[V] target id -> row of the draft vocabulary, or -1."""
    index = head.draft_ids.new_full((head.config.vocab_size,), -1)
    index[head.draft_ids] = torch.arange(len(head.draft_ids), device=index.device)
    return index


def save_checkpoint(path: Path, state: dict) -> None:
    """Written beside and renamed: a kill or a full disk leaves the previous checkpoint whole."""
    beside = path.with_suffix(".partial")
    try:
        torch.save(state, beside)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        beside.unlink(missing_ok=True)
        raise HeadError(f"cannot write checkpoint {path}: {error}", "free some space, then continue with --resume") from error


def load_checkpoint(path: Path, head: AnyHead, optimizers: list) -> int:
    """Restore head and optimisers; the step to continue with, 0 when there is no checkpoint."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")  # each is copied to where its parameter is
        parameters = dict(head.named_parameters())
        head.load_state_dict({name: sharded_like(value, parameters.get(name)) for name, value in state["head"].items()})
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for i, kept in saved["state"].items():
                saved["state"][i] = {name: sharded_like(value, ordered[i]) for name, value in kept.items()}
            optimizer.load_state_dict(saved)
        return state["step"]
    except Exception as error:  # torch raises a dozen kinds for a file that is cut or changed
        raise HeadError(
            f"checkpoint {path} is damaged: {(str(error).splitlines() or [type(error).__name__])[0]}",
            "delete it and continue with --resume: the steps are made again from the answers",
        ) from error
