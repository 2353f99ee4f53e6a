"""A new head that starts from the target's own last layers instead of from noise."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from dspark.config import HeadConfig, RecurrentConfig, Sizes
from dspark.errors import HeadError, SettingError
from dspark.head.head import Head
from dspark.head.mtp import MtpHead, load_mtp
from dspark.head.recurrent import NETWORKS, Eagle3, Mtp, RecurrentHead
from dspark.target.target import Target, final_norm

BIAS_ROWS = "markov_head.markov_w2.weight"  # what a head learns of each draft token


def new_head(target: Target, config: HeadConfig, draft_ids: torch.Tensor, seed: int, warm_start: str = "last") -> Head:
    """Draft layers copy the target's last layers where the shapes allow; the rest is drawn from `seed`.

    The context projection starts as the identity on the deepest tapped layer, so that the copied
    key and value projections meet the states they were made for. W1 starts as the leading
    components of the embedding: tokens that mean alike start with like biases; W2 starts at 0.
    With `warm_start` mtp the first layer and the projection start as the target's first multi-token-prediction module instead (`HeadError`
    where it has none)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mask = target.embed(torch.tensor(config.mask_token_id, device=target.device)).detach().float().cpu()
        head = Head(config, draft_ids, target.output_rows(draft_ids).cpu(), mask)
        for parameter in head.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        D = config.hidden_size
        head.fc.weight.data[:, -D:] += torch.eye(D)
        L = config.num_hidden_layers
        sources = (
            list(target.layers)[-L:]
            if warm_start in ("last", "mtp")
            else [target.layers[0], *list(target.layers)[len(target.layers) - L + 1 :]]
        )
        for layer, source in zip(head.layers, sources, strict=True):
            copy_layer(layer, source, config)
        if warm_start == "mtp":
            begin_as_module(head, module_to_begin_as(target))
        if head.markov_head is not None:
            leading = leading_components(target, config.markov_rank)
            head.markov_head.markov_w1.weight.data[:, : leading.shape[1]] = leading
            head.markov_head.markov_w2.weight.data.zero_()
        if head.confidence_head is not None:
            head.confidence_head.proj.weight.data.zero_()
            head.confidence_head.proj.bias.data.zero_()
        return head.to(target.device)


def new_recurrent_head(target: Target, config: RecurrentConfig, draft_ids: torch.Tensor, seed: int) -> RecurrentHead:
    """Its layer copies the target's last one where the shapes allow; the rest is drawn from `seed`.

    What joins embedding and state (eh_proj), or the target's layers (fc), starts as the identity on the state, or the deepest layer, and
    the norm before the output rows as the target's: at first the head says what one more layer of the target would."""
    D = config.hidden_size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = NETWORKS[config.kind](config, draft_ids, torch.empty(0), target.embed)
        for parameter in head.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        rows = target.output_rows(draft_ids).cpu()
        joined = head.layer.eh_proj if isinstance(head, Mtp) else head.fc
        joined.weight.data[:, -D:] += torch.eye(D)
        copy_layer(head.layer, target.layers[-1], config)
        if isinstance(head, Eagle3):
            head.lm_head.weight.data.copy_(rows)
            head.midlayer.hidden_norm.load_state_dict(head.midlayer.input_layernorm.state_dict())
        else:
            head.output_rows = rows
        scale = final_scale(target)
        if scale is not None:
            head.norm.weight.data.copy_(scale)
        return head.to(target.device)


def final_scale(target: Target) -> torch.Tensor | None:
    """What the target's last norm multiplies with [D]; None for a norm of another kind than RMS."""
    norm = final_norm(target.model)
    scale, moved = norm_scale(norm, target.hidden_size), norm_scale(norm, target.hidden_size, 0.0)
    return None if moved.any() or not torch.isfinite(scale).all() else scale


def module_to_begin_as(target: Target) -> MtpHead | Mtp:
    """The target's modules. Raises `HeadError` where it has none, or a trained head of another kind in their place."""
    mtp = load_mtp(target)
    if not isinstance(mtp, RecurrentHead) or isinstance(mtp, Mtp):
        return mtp
    raise HeadError(f"a head of the kind {mtp.kind} is no multi-token-prediction module to start from", "give --mtp one of the kind mtp")


def begin_as_module(head: Head, mtp: MtpHead | Mtp) -> None:
    """Let the first draft layer start as the block of the first module, where the shapes allow, and the context projection as what that
    module does to the target's last state: the half of its `eh_proj` that reads it, on the deepest tapped layer, with the scales of the
    norms before it. So the copied keys and values meet the states that they were trained on, but for the embeddings beside them."""
    D = head.config.hidden_size
    if isinstance(mtp, Mtp):
        copy_layer(head.layers[0], mtp.layer, head.config)
        head.fc.weight.data[:, -D:] = (mtp.layer.eh_proj.weight[:, D:] * mtp.layer.hnorm.weight).detach().float().cpu()
        return
    module: Any = mtp.model.layers[0]
    block: Any = module.mtp_block
    copy_layer(head.layers[0], block, head.config)
    for name in ("input_layernorm", "post_attention_layernorm"):
        if hasattr(block, name):  # families hold the scale of a norm in their own ways
            cast(Any, head.layers[0])._modules[name].weight.data.copy_(norm_scale(getattr(block, name), D))
    weight = cast(torch.Tensor, cast(Any, module).eh_proj.weight).detach().float().cpu()
    state_first = getattr(cast(Any, module).config, "mtp_hidden_states_first", False)
    scale = norm_scale(cast(Any, module).hnorm, D) * (1 if mtp.before_norm else norm_scale(mtp.norm, D))
    head.fc.weight.data[:, -D:] = (weight[:, :D] if state_first else weight[:, D:]) * scale


def norm_scale(norm: nn.Module, size: int, length: float = 1024.0) -> torch.Tensor:
    """What an RMS norm multiplies with [D], however it holds it."""
    like = next(norm.parameters())
    with torch.no_grad():
        return norm(torch.full((1, size), length, dtype=like.dtype, device=like.device))[0].float().cpu()


def widened(head: Head, target: Target, rank: int) -> Head:
    """The same head with a sequential head of a larger rank: it drafts as before until it is trained on.

    New columns of W1 are the embedding's next components, new columns of W2 and of the confidence head are 0.
    Raises `SettingError` for a rank that is no larger, and for heads whose gates would change."""
    config = head.config
    if config.markov_head_type != "vanilla" or not 0 < config.markov_rank <= rank:
        raise SettingError(
            f"a {config.markov_head_type} head of rank {config.markov_rank} cannot be widened to rank {rank}",
            "only vanilla heads can, to a larger rank; train a new one without --start-from",
        )
    wide = Head(replace(config, markov_rank=rank), head.draft_ids, head.output_rows, head.mask_embedding)
    given = head.state_dict()
    for name, parameter in wide.state_dict().items():
        parameter.zero_()
        if name == "markov_head.markov_w1.weight":
            leading = leading_components(target, rank)
            parameter[:, : leading.shape[1]] = leading
        parameter[tuple(slice(size) for size in given[name].shape)] = given[name]
    return wide.to(target.device)


def with_vocabulary(head: Head, target: Target, draft_ids: torch.Tensor) -> Head:
    """The same head for other draft tokens [Vd], as many and ascending: of those that it had it says what it said before, the others begin
    with the target's output row and no bias."""
    other = Head(head.config, draft_ids, target.output_rows(draft_ids).cpu(), head.mask_embedding.cpu())
    given = {name: tensor.cpu() for name, tensor in head.state_dict().items()}
    rows = given.get(BIAS_ROWS)
    if rows is not None:
        kept = torch.isin(draft_ids, head.draft_ids.cpu())
        given[BIAS_ROWS] = torch.zeros_like(rows)
        given[BIAS_ROWS][kept] = rows[torch.isin(head.draft_ids.cpu(), draft_ids)]
    other.load_state_dict(given)
    return other.to(target.device)


def leading_components(target: Target, rank: int) -> torch.Tensor:
    """The target's token embeddings in their `rank` leading directions (fewer if there are fewer), each of unit spread [V, r]."""
    embedding = target.embed(torch.arange(target.vocab_size, device=target.device)).detach().float().cpu()
    embedding = embedding - embedding.mean(0)
    _, _, components = torch.linalg.svd(embedding[::16], full_matrices=False)
    projected = embedding @ components[:rank].T
    return projected / projected.std().clamp_min(1e-6)


def copy_layer(layer: nn.Module, source: nn.Module, config: Sizes) -> None:
    """Copy every tensor that has the same name and shape; widen grouped key heads by repetition. Projections that read an embedding
    too (EAGLE-3) get it for the second half of what they read, the state."""
    given = {name: p.detach().float().cpu() for name, p in source.named_parameters()}
    for name, parameter in layer.named_parameters():
        weight = given.get(name)
        if weight is None:
            continue
        if name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight") and weight.shape[0] < parameter.shape[0]:
            groups = parameter.shape[0] // weight.shape[0]
            weight = weight.view(-1, config.head_dim, weight.shape[1]).repeat_interleave(groups, dim=0).flatten(0, 1)
        if weight.shape == parameter.shape:
            parameter.data.copy_(weight)
        elif name.startswith("self_attn.") and parameter.shape == (weight.shape[0], 2 * config.hidden_size):
            parameter.data[:, config.hidden_size :] = weight
