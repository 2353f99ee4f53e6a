"""Tiny targets on disk with multi-token-prediction modules of random weights, in the names of the released checkpoints."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from tiny import FAMILIES, SHAPE, SPREAD, randomized, tiny_model

# family -> (modules, what its config needs besides, where their tensors are)
WITH_MTP = {
    "qwen3_5": (1, {}, "mtp."),
    "qwen3_5_moe": (1, {}, "mtp."),
    "deepseek_v3": (1, {"num_nextn_predict_layers": 1}, "model.layers.{layer}."),
    # Sliding layers with more heads than the others, as the released size has them.
    "step3p7": (
        3,
        {
            "num_nextn_predict_layers": 3,
            "layer_types": ["full_attention", "sliding_attention"] * 2 + ["sliding_attention"] * 3,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"] + ["dense"] * 3,
            "num_sliding_attention_heads": 8,
        },
        "model.layers.{layer}.",
    ),
}
# Families of the same layouts, of which less is run.
ALSO_WITH_MTP = {
    "qwen3_next": (1, {}, "mtp."),
    "glm4_moe": (1, {"num_nextn_predict_layers": 1}, "model.layers.{layer}."),
}
QWEN_NAMES = {"eh_proj": "fc", "enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "post_norm": "norm"}


def save_with_mtp(folder: Path, family: str, seed: int = 0, shards: bool = False, **overrides) -> Path:
    """A tiny model of this family, saved with the modules of `modules_of`; `shards` puts those in a file of their own."""
    tiny_model(family, seed, **(WITH_MTP | ALSO_WITH_MTP)[family][1], **overrides).save_pretrained(folder)
    tensors, ours = load_file(folder / "model.safetensors"), tensors_of(family, *modules_of(family, seed, **overrides))
    if shards:
        (folder / "model.safetensors").unlink()
        files = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": ours}
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        files = {"model.safetensors": tensors | ours}
    for file, held in files.items():
        save_file(held, folder / file, {"format": "pt"})
    return folder


def modules_of(family: str, seed: int = 0, **overrides) -> tuple[MtpModel, list[torch.Tensor]]:
    """transformers' modules with random weights on the tiny model of this seed, and an output head of each."""
    count, settings, _ = (WITH_MTP | ALSO_WITH_MTP)[family]
    model = tiny_model(family, seed, **settings, **overrides)
    config = model.config.get_text_config()
    config.num_mtp_layers = count
    if family != "step3p7" and getattr(config, "layer_types", None):
        config.mtp_layer_types = config.layer_types[-1:]
    if family == "step3p7":
        config.mtp_per_layer_config = {k: {"num_attention_heads": 8} for k in range(count)}
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        modules = MtpModel(model, count).float().eval()
        for name, parameter in randomized(modules.layers).named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        output = model.lm_head.weight
        own = [SPREAD * torch.randn_like(output) if family == "step3p7" else output for _ in range(count)]
    return modules, own


def tensors_of(family: str, modules: MtpModel, outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """These weights under the names of a released checkpoint."""
    place, num_layers = (WITH_MTP | ALSO_WITH_MTP)[family][2], SHAPE["num_hidden_layers"]
    named: dict[str, torch.Tensor] = {}
    for name, tensor in modules.state_dict().items():
        match = re.match(r"layers\.(\d+)\.(mtp_block\.)?(.*)", name)
        if match is not None:  # else it is the target's
            named |= in_place(family, place.format(layer=num_layers + int(match[1])), match[3], bool(match[2]), tensor)
    for k, output in enumerate(outputs):
        where = place.format(layer=num_layers + k)
        if family in ("deepseek_v3", "glm4_moe"):
            named[f"{where}shared_head.head.weight"] = output
            named[f"{where}embed_tokens.weight"] = modules.embed_tokens.weight
        elif family == "step3p7":
            named[f"{where}transformer.shared_head.output.weight"] = output
    return {name: tensor.clone().contiguous() for name, tensor in named.items()}


def in_place(family: str, where: str, name: str, block: bool, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """One tensor under its name, or names, in a checkpoint."""
    if not block:
        module, kind = name.split(".")
        if family.startswith("qwen"):
            return {f"{where}{QWEN_NAMES[module]}.{kind}": tensor}
        if module == "post_norm":
            module = "transformer.shared_head.norm" if family == "step3p7" else "shared_head.norm"
        return {f"{where}{module}.{kind}": tensor}
    inside = f"{where}layers.0." if family.startswith("qwen") else where
    if name == "mlp.experts.gate_up_proj":
        halves = {"gate_proj": tensor.chunk(2, dim=1)[0], "up_proj": tensor.chunk(2, dim=1)[1]}
        return {f"{inside}mlp.experts.{e}.{half}.weight": t[e] for half, t in halves.items() for e in range(len(tensor))}
    if name == "mlp.experts.down_proj":
        return {f"{inside}mlp.experts.{e}.down_proj.weight": tensor[e] for e in range(len(tensor))}
    return {f"{inside}{name}": tensor}


assert (WITH_MTP | ALSO_WITH_MTP).keys() <= FAMILIES.keys()
