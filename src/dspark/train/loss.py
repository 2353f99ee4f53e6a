"""The paper's loss (eq. 9-12) from the teacher's best tokens.

The target's law is known for its P best tokens; what lies outside counts as no overlap, so the
acceptance used here is a lower bound, tight where drafts matter.

Shapes: N sequences, A anchors, G block size, Vd draft vocabulary, P teacher tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dspark.config import TrainConfig
from dspark.train.batch import Batch


@dataclass(frozen=True)
class Losses:
    """`total` to minimise, and per position [G]: overlap (acceptance at T = 1) and greedy agreement (T = 0)."""

    total: torch.Tensor
    parts: dict[str, float]
    overlap_NAG: torch.Tensor
    agree_NAG: torch.Tensor
    valid_NAG: torch.Tensor


def losses(logits_NAGV, confidence_NAG, batch: Batch, draft_index_V: torch.Tensor, config: TrainConfig) -> Losses:
    """`draft_index_V` maps target ids to rows of the draft vocabulary, -1 where the draft has none."""
    log_q = logits_NAGV.float().log_softmax(-1)
    weight = batch.valid_NAG * torch.exp(-torch.arange(logits_NAGV.shape[2]) / config.decay)

    def mean(loss_NAG: torch.Tensor, weight_NAG: torch.Tensor = weight) -> torch.Tensor:
        return (loss_NAG * weight_NAG).sum() / weight_NAG.sum().clamp_min(1e-9)

    index = draft_index_V[batch.teacher_ids_NAGP]
    known = index >= 0
    log_q_teacher = log_q.gather(-1, index.clamp_min(0)).masked_fill(~known, float("-inf"))
    overlap = torch.minimum(batch.teacher_probs_NAGP, log_q_teacher.exp()).sum(-1)

    if config.teacher_ce:
        probs = batch.teacher_probs_NAGP * known
        cross_entropy = -(probs * log_q_teacher.masked_fill(~known, 0.0)).sum(-1) / probs.sum(-1).clamp_min(1e-3)
        ce = mean(cross_entropy)
    else:
        next_index = draft_index_V[batch.next_NAG]
        ce = mean(-log_q.gather(-1, next_index.clamp_min(0)[..., None])[..., 0], weight * (next_index >= 0))
    l1 = mean(2 - 2 * overlap)
    total = config.ce_weight * ce + config.l1_weight * l1
    parts = {"ce": ce.item(), "l1": l1.item()}
    if confidence_NAG is not None:
        label = overlap.detach().clamp(0, 1)  # c* = 1 - ||q - p||_1 / 2 (eq. 8)
        confidence = mean(F.binary_cross_entropy_with_logits(confidence_NAG.float(), label, reduction="none"))
        total = total + config.confidence_weight * confidence
        parts["confidence"] = confidence.item()
    best = torch.where(known[..., 0], index[..., 0], -1)
    agree = (log_q.argmax(-1) == best) & batch.valid_NAG
    return Losses(total, parts, overlap.detach() * batch.valid_NAG, agree, batch.valid_NAG)
