"""One training step's input: anchors drawn in several answers, their blocks packed side by side.

Shapes: N sequences, A anchors, G block size, S context tokens, M layers, D hidden, P teacher tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark.train.features import Sample


@dataclass(frozen=True)
class Batch:
    features_NSMD: torch.Tensor
    anchors_NA: torch.Tensor  # position of each anchor in its sequence
    previous_NAG: torch.Tensor  # the token before each drafted one: anchor, x_1, ..., x_{G-1}
    next_NAG: torch.Tensor  # the token each row must predict
    valid_NAG: torch.Tensor  # False past the answer's end
    teacher_ids_NAGP: torch.Tensor
    teacher_probs_NAGP: torch.Tensor
    visible_NAS: torch.Tensor  # the context a block may look at: what lies strictly before its anchor


def make_batch(samples: Sequence[Sample], num_anchors: int, block_size: int, generator: torch.Generator | None) -> Batch:
    """Draw `num_anchors` anchors in each sample; None as generator takes the first ones, for measuring."""
    N, A, G = len(samples), num_anchors, block_size
    longest = max(len(s.ids_S) for s in samples)
    features = torch.zeros(N, longest - 1, *samples[0].features_SMD.shape[1:], dtype=samples[0].features_SMD.dtype)
    ids = torch.zeros(N, longest + G + 1, dtype=torch.long)
    P = samples[0].teacher_ids_nP.shape[1]
    anchors, rows, valid = (
        torch.zeros(N, A, dtype=torch.long),
        torch.zeros(N, A, G, dtype=torch.long),
        torch.zeros(N, A, G, dtype=torch.bool),
    )
    teacher_ids, teacher_probs = torch.zeros(N, A, G, P, dtype=torch.long), torch.zeros(N, A, G, P)
    for n, sample in enumerate(samples):
        S, rows_known = len(sample.ids_S), len(sample.teacher_ids_nP)
        features[n, : S - 1] = sample.features_SMD
        ids[n, :S] = sample.ids_S
        order = torch.randperm(rows_known, generator=generator) if generator else torch.arange(rows_known)
        chosen = order[:A]
        anchors[n, : len(chosen)] = sample.start + chosen
        rows = chosen[:, None] + torch.arange(G)
        valid[n, : len(chosen)] = rows < rows_known
        rows = rows.clamp_max(rows_known - 1)
        teacher_ids[n, : len(chosen)] = sample.teacher_ids_nP[rows].long()
        teacher_probs[n, : len(chosen)] = sample.teacher_probs_nP[rows].float()
    positions = anchors[:, :, None] + torch.arange(G + 1)
    tokens = ids.gather(1, positions.view(N, -1)).view(N, A, G + 1)
    visible = torch.arange(longest - 1) < anchors[:, :, None]
    return Batch(features, anchors, tokens[..., :-1], tokens[..., 1:], valid, teacher_ids, teacher_probs, visible)
