"""The paper's loss (eq. 9-12) from the teacher's best tokens.

The target's law is known for its P best tokens; what lies outside counts as no overlap, so the
acceptance used here is a lower bound, tight where drafts matter.

Shapes: N sequences, A anchors, G block size, Vd draft vocabulary, P teacher tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dspark.config import TrainConfig
from dspark.train.batch import Batch


class LogSoftmaxAt(torch.autograd.Function):
    """log_softmax(logits_RV) at a few columns index_RP a row, in float32, without its other columns.

    The full float32 softmax and its gradient were a third of a training step. Rows are taken in
    chunks that stay in the processor's cache; only the logits, in their own precision, are kept."""

    CHUNK = 128

    @staticmethod
    def forward(ctx, logits_RV, index_RP):
        lse_R = torch.cat([chunk.float().logsumexp(-1) for chunk in logits_RV.split(LogSoftmaxAt.CHUNK)])
        ctx.save_for_backward(logits_RV, index_RP, lse_R)
        return logits_RV.gather(-1, index_RP).float() - lse_R[:, None]

    @staticmethod
    def backward(ctx, *grads):
        (grad_RP,) = grads
        logits_RV, index_RP, lse_R = ctx.saved_tensors
        grad_RV = torch.empty_like(logits_RV)
        for logits, index, lse, grad, out in zip(
            *(t.split(LogSoftmaxAt.CHUNK) for t in (logits_RV, index_RP, lse_R, grad_RP, grad_RV)), strict=True
        ):
            full = (logits.float() - lse[:, None]).exp_().mul_(-grad.sum(-1, keepdim=True))
            out.copy_(full.scatter_add_(-1, index, grad))
        return grad_RV, None


def log_softmax_at(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`logits.log_softmax(-1).gather(-1, index)` [..., P] in float32, for logits [..., V]."""
    if logits.device.type != "cpu":  # a GPU has one kernel for it each way; chunks would cost it thousands of launches
        return logits.log_softmax(-1, dtype=torch.float32).gather(-1, index)
    V, P = logits.shape[-1], index.shape[-1]
    return LogSoftmaxAt.apply(logits.reshape(-1, V), index.reshape(-1, P)).view(index.shape)


@dataclass(frozen=True)
class Losses:
    """`total` to minimise, and the overlap of draft and target law: acceptance at T = 1."""

    total: torch.Tensor
    overlap_NAG: torch.Tensor
    valid_NAG: torch.Tensor


def itself(total: torch.Tensor) -> torch.Tensor:
    return total


def losses(
    logits_NAGV,
    confidence_NAG,
    batch: Batch,
    draft_index_V: torch.Tensor,
    config: TrainConfig,
    mean_total: Callable[[torch.Tensor], torch.Tensor] = itself,
) -> Losses:
    """`draft_index_V` maps target ids to rows of the draft vocabulary, -1 where the draft has none.

    Where several processes share a batch, `mean_total` gives the mean over them of a sum of weights: the mean of their losses, and
    of their gradients, is then that of the whole batch."""
    weight = batch.valid_NAG * torch.exp(-torch.arange(logits_NAGV.shape[2], device=logits_NAGV.device) / config.decay)

    def mean(loss_NAG: torch.Tensor, weight_NAG: torch.Tensor = weight) -> torch.Tensor:
        return (loss_NAG * weight_NAG).sum() / mean_total(weight_NAG.sum()).clamp_min(1e-9)

    index = draft_index_V[torch.cat([batch.teacher_ids_NAGP, batch.next_NAG[..., None]], dim=-1)]
    log_q = log_softmax_at(logits_NAGV, index.clamp_min(0))
    index, next_index, log_q_next = index[..., :-1], index[..., -1], log_q[..., -1]
    known = index >= 0
    log_q_teacher = log_q[..., :-1].masked_fill(~known, float("-inf"))
    overlap = torch.minimum(batch.teacher_probs_NAGP, log_q_teacher.exp()).sum(-1)

    if config.teacher_ce:
        probs = batch.teacher_probs_NAGP * known
        cross_entropy = -(probs * log_q_teacher.masked_fill(~known, 0.0)).sum(-1) / probs.sum(-1).clamp_min(1e-3)
        ce = mean(cross_entropy)
    else:
        ce = mean(-log_q_next, weight * (next_index >= 0))
    l1 = mean(2 - 2 * overlap)
    total = config.ce_weight * ce + config.l1_weight * l1
    if confidence_NAG is not None:
        label = overlap.detach().clamp(0, 1)  # c* = 1 - ||q - p||_1 / 2 (eq. 8)
        confidence = mean(F.binary_cross_entropy_with_logits(confidence_NAG.float(), label, reduction="none"))
        total = total + config.confidence_weight * confidence
    return Losses(total, overlap.detach() * batch.valid_NAG, batch.valid_NAG)


def greedy_agreement(logits_NAGV: torch.Tensor, batch: Batch, draft_index_V: torch.Tensor) -> torch.Tensor:
    """[N, A, G] whether the draft's best token is the target's: acceptance at T = 0."""
    return (logits_NAGV.argmax(-1) == draft_index_V[batch.teacher_ids_NAGP[..., 0]]) & batch.valid_NAG
