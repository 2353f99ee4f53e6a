"""One training step's input: anchors drawn in several answers, their blocks packed side by side.

Shapes: N sequences, A anchors, G block size, S context tokens, M layers, D hidden, P teacher tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from dspark.train.features import FeatureStore, Sample

WIDTH = 64  # contexts of resident batches are padded to a multiple of it: few shapes, so that freed memory fits again


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
    following_NS: torch.Tensor  # the token after each of the context

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def draw_batch(
    store: FeatureStore, chosen: Sequence[int], num_anchors: int, block_size: int, generator: torch.Generator, share: slice = slice(None)
) -> Batch:
    """A batch of these records, or of a share of them, on the target's device; the same anchors wherever the samples lie and whatever
    the share."""
    drawn = draw_anchors([len(store.records[i]["answer_ids"]) for i in chosen], num_anchors, generator)[share]
    if store.resident:
        return resident_batch(store, chosen[share], num_anchors, block_size, drawn)
    return make_batch([store[i] for i in chosen[share]], num_anchors, block_size, None, drawn).to(store.target.device)


def draw_anchors(counts: Sequence[int], num_anchors: int, generator: torch.Generator | None) -> list[torch.Tensor]:
    """Of each record some of its rows, which it has so many of; without a generator the first ones."""
    orders = [torch.randperm(count, generator=generator) if generator else torch.arange(count) for count in counts]
    return [order[:num_anchors] for order in orders]


def resident_batch(store: FeatureStore, chosen: Sequence[int], num_anchors: int, block_size: int, drawn: Sequence[torch.Tensor]) -> Batch:
    """What `make_batch` makes of these records, gathered on the GPU in a few operations instead of some for each record."""
    A, G = num_anchors, block_size
    store.fill(chosen)
    lengths = [store.lengths[i] for i in chosen]
    starts = [len(store.records[i]["prompt_ids"]) - 1 for i in chosen]
    drawn_NA = torch.zeros(len(chosen), A, dtype=torch.long)
    used_NA = torch.zeros(len(chosen), A, dtype=torch.bool)
    for n, order in enumerate(drawn):
        drawn_NA[n, : len(order)], used_NA[n, : len(order)] = order, True
    columns = torch.tensor([[store.first_rows[i] for i in chosen], lengths, starts, list(chosen)])
    device, packed = store.target.device, torch.cat([columns.T, drawn_NA, used_NA], dim=1)  # one copy to the GPU for all of it
    packed = packed.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else packed
    offset, length, start, index = packed[:, :4].split(1, dim=1)
    drawn_NA, used_NA = packed[:, 4 : 4 + A], packed[:, 4 + A :].bool()
    width = -(-max(lengths) // WIDTH) * WIDTH
    context_NS = torch.minimum(torch.arange(width, device=device), length - 1) + offset
    anchors_NA = torch.where(used_NA, start + drawn_NA, 0)
    steps_G1 = torch.arange(G + 1, device=device)
    rows_NAG = drawn_NA[:, :, None] + steps_G1[:-1]
    known_N11 = (length - start)[:, :, None]
    valid_NAG = (rows_NAG < known_N11) & used_NA[:, :, None]
    teacher_NAG = (offset + start)[:, :, None] + torch.minimum(rows_NAG, known_N11 - 1)
    # Past the end a token is 0, as in `make_batch`. Each record has one more token than rows.
    position_NAG = anchors_NA[:, :, None] + steps_G1
    within_NAG = position_NAG <= length[:, :, None]
    tokens = store.ids[(offset + index)[:, :, None] + torch.minimum(position_NAG, length[:, :, None])].long() * within_NAG
    visible_NAS = torch.arange(width, device=device) < anchors_NA[:, :, None]
    teacher_ids, teacher_probs = store.teacher_ids[teacher_NAG].long(), store.teacher_probs[teacher_NAG].float()
    following_NS = store.ids[context_NS + index + 1].long()  # past the end: the last token again
    return Batch(
        store.kept(context_NS), anchors_NA, tokens[..., :-1], tokens[..., 1:], valid_NAG, teacher_ids, teacher_probs, visible_NAS,
        following_NS,
    )  # fmt: skip


def make_batch(
    samples: Sequence[Sample],
    num_anchors: int,
    block_size: int,
    generator: torch.Generator | None,
    drawn: Sequence[torch.Tensor] | None = None,
) -> Batch:
    """Draw `num_anchors` anchors in each sample, if they are not `drawn` yet; None as generator takes the first ones, for measuring."""
    N, A, G, device = len(samples), num_anchors, block_size, samples[0].features_SMD.device
    longest = max(len(s.ids_S) for s in samples)
    features = samples[0].features_SMD.new_zeros(N, longest - 1, *samples[0].features_SMD.shape[1:])
    ids = torch.zeros(N, longest + G + 1, dtype=torch.long, device=device)
    P = samples[0].teacher_ids_nP.shape[1]
    anchors, rows, valid = (
        torch.zeros(N, A, dtype=torch.long, device=device),
        torch.zeros(N, A, G, dtype=torch.long, device=device),
        torch.zeros(N, A, G, dtype=torch.bool, device=device),
    )
    teacher_ids, teacher_probs = torch.zeros(N, A, G, P, dtype=torch.long, device=device), torch.zeros(N, A, G, P, device=device)
    drawn = draw_anchors([len(s.teacher_ids_nP) for s in samples], A, generator) if drawn is None else drawn
    for n, (sample, order) in enumerate(zip(samples, drawn, strict=True)):
        S, rows_known = len(sample.ids_S), len(sample.teacher_ids_nP)
        features[n, : S - 1] = sample.features_SMD
        ids[n, :S] = sample.ids_S
        chosen = order.to(device)
        anchors[n, : len(chosen)] = sample.start + chosen
        rows = chosen[:, None] + torch.arange(G, device=device)
        valid[n, : len(chosen)] = rows < rows_known
        rows = rows.clamp_max(rows_known - 1)
        teacher_ids[n, : len(chosen)] = sample.teacher_ids_nP[rows].long()
        teacher_probs[n, : len(chosen)] = sample.teacher_probs_nP[rows].float()
    positions = anchors[:, :, None] + torch.arange(G + 1, device=device)
    tokens = ids.gather(1, positions.view(N, -1)).view(N, A, G + 1)
    visible = torch.arange(longest - 1, device=device) < anchors[:, :, None]
    return Batch(features, anchors, tokens[..., :-1], tokens[..., 1:], valid, teacher_ids, teacher_probs, visible, ids[:, 1:longest])
