"""EAGLE-3 heads of other projects, which are only read: SpecForge's folder (SGLang serves it) and that of speculators (vLLM).

One decoder layer, `fc` in front of it, and output rows of its own over a draft vocabulary. Which of the target's layers it reads is told
in two ways: SpecForge counts layers' outputs from 0, as dspark does, speculators one higher, with the embeddings as 0. Where nothing is told,
the engines take the outputs of layers 1, n/2 - 1 and n - 4 of n. Neither says how many tokens a draft has."""

import platform
from pathlib import Path
from typing import Any

import torch

from dspark.errors import HeadError
from dspark.formats.portable import draft_ids_of_offsets, embedding_rows, embedding_scale, refuse_unlike
from dspark.head.folder import SHARED, empty_head, read_weights, recurrent_config, refuse_other_target, refuse_other_tensors, save_head
from dspark.head.golden import refuse_broken
from dspark.head.recurrent import RecurrentHead
from dspark.prompts import read_json
from dspark.target.target import Target

NAMED = "eagle_aux_hidden_state_layer_ids"  # the key of the layers it reads
BLOCK = 5  # planners ask for fewer where fewer pay
SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "rms_norm_eps", "vocab_size")
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What some of them compute besides, by the keys that say so.
OTHERS = {"fc_norm": "a norm before its layers meet", "norm_output": "a norm of the state that it hands on", "mlp_bias": "biases in its MLP",
          "norm_before_residual": "the norm before the residual"}  # fmt: skip


def is_eagle3(raw: dict) -> bool:
    """Does this config.json describe one of another project?"""
    if "dspark" in raw or "dflash_config" in raw or "target_layer_ids" in raw:
        return False
    if "speculators_model_type" in raw:
        return raw["speculators_model_type"] == "eagle3"
    # the first ones call themselves a Llama of one layer
    names = raw.get("architectures")
    named = any("Eagle3" in str(name) for name in (names if isinstance(names, list) else [names]))
    return named or ("draft_vocab_size" in raw and raw.get("num_hidden_layers") == 1)


def read(path: Path, target: Target) -> RecurrentHead:
    """The head in a folder. Raises `HeadError` for one of another target, or with layers that dspark does not run."""
    where = f"{path}/config.json"
    raw = object_in(read_json(path / "config.json", HeadError, "restore the file"), where)
    layer = object_in(first_told(raw.get("transformer_layer_config"), raw), where)
    told = object_in(first_told(raw.get("eagle_config"), {}), where)
    rope = object_in(first_told(layer.get("rope_parameters"), {}), where)
    reasons = [reason for key, reason in OTHERS.items() if raw.get(key) or layer.get(key)]
    if raw.get("target_hidden_size") not in (None, layer.get("hidden_size")):
        reasons.append("states of another size than the target's")
    if layer.get("num_hidden_layers", 1) != 1:
        reasons.append(f"{layer['num_hidden_layers']} layers")
    if reasons:
        raise HeadError(
            f"{where}: an EAGLE-3 head with {' and '.join(reasons)}", "dspark runs the layer of the paper: one, normed on its way in"
        )
    values: dict[str, Any] = {name: layer.get(name) for name in SIZES}
    hidden, heads = layer.get("hidden_size"), layer.get("num_attention_heads")
    values |= {
        "head_dim": first_told(layer.get("head_dim"), hidden // heads if type(hidden) is type(heads) is int and heads else None),
        "rope_theta": first_told(layer.get("rope_theta"), rope.get("rope_theta"), 10_000.0),  # Llama's default
        "draft_vocab_size": first_told(raw.get("draft_vocab_size"), layer.get("vocab_size")),
    }
    # How many steps it was trained on is not told; whoever trains it further does so on these.
    section = {"kind": "eagle3", "block_size": BLOCK, "trained_steps": BLOCK, "num_target_layers": target.num_layers}
    section["target_layer_ids"] = layers_read(raw, told, target.num_layers, where)
    config = recurrent_config(layer | values, section, where)
    refuse_other_target(config, {}, target)
    if embedding_scale(target) != 1:
        raise HeadError(f"{target.name} scales its embeddings, and EAGLE-3's layer takes them raw: dspark cannot run {path}")
    file = f"{path}: the file of its weights"
    tensors = {name.removeprefix("model.").replace("layers.0.", "midlayer."): tensor for name, tensor in weights_in(path).items()}
    draft_ids = draft_ids_of_offsets(tensors, config.vocab_size, config.draft_vocab_size, file)
    for name, tensor in tensors.items():
        if tensor.dtype not in PRECISIONS:
            raise HeadError(f"{file}: {name} is of the type {tensor.dtype}", "dspark reads heads in float32, float16 and bfloat16")
    embedded = tensors.pop(SHARED[0], None)  # some bring a copy of the target's
    if embedded is not None:
        refuse_unlike(SHARED[0], embedded.float(), embedding_rows(target), file)
    refuse_other_tensors(config, tensors, file)
    refuse_broken(tensors, f"{file} is damaged", "restore the file")
    head = empty_head(config, draft_ids, target)
    head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    assert isinstance(head, RecurrentHead)
    return head


def object_in(value: Any, where: str) -> dict:
    if not isinstance(value, dict):
        raise HeadError(f"{where} is damaged: an object was expected", "restore the file")
    return value


def first_told(*values: Any) -> Any:
    """The first that is not null."""
    return next((value for value in values if value is not None), None)


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    """Safetensors, or the pickle that the first heads were published as, of which nothing but tensors is taken."""
    pickled = path / "pytorch_model.bin"
    if any(path.glob("*.safetensors*")) or not pickled.exists():
        return read_weights(path)
    try:
        found = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged one raises anything
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise HeadError(f"cannot read {pickled}: {reason}", "restore the file") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) and is_plain(tensor) for name, tensor in found.items()):
        raise HeadError(f"{pickled} is damaged: tensors by name were expected", "restore the file")
    return found


def is_plain(tensor: Any) -> bool:
    """Not a sparse one, or one without numbers, which a pickle may hold too."""
    return isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"


def named_layers(raw: dict, told: dict) -> Any:
    """The layers that the head names, as it counts them; None where it names none."""
    return first_told(told.get(NAMED), raw.get(NAMED))


def layers_read(raw: dict, told: dict, num_layers: int, where: str) -> list[int]:
    """The target's layers, counted as dspark does."""
    first = 1 if "speculators_model_type" in raw else 0
    ids = named_layers(raw, told)
    if ids is None:
        return [1, num_layers // 2 - 1, num_layers - 4]
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):  # the usual ones would be a guess
        raise HeadError(f"{where}: {NAMED} is {ids!r}, a list of layer numbers was expected", "restore the file")
    layers = [i - first for i in ids]
    if not all(-1 <= i < num_layers for i in layers):
        raise HeadError(
            f"{where}: {NAMED} is {ids}, which are not all layers of a target with {num_layers}", "was it made for another target?"
        )
    return layers


def bring_in(source: Path, path: Path, target: Target, golden_ids: list[int], command: str) -> tuple[tuple[int, ...], bool]:
    """Write it as a head of dspark's own. The target's layers that it reads, and whether its files name them."""
    head = read(source, target)
    provenance = {"command": command, "converted_from": "eagle3", "python": platform.python_version()}
    layers = ", ".join(map(str, head.layer_ids))
    save_head(head, target, path, golden_ids, provenance, CARD.format(name=target.name, layers=layers, config=head.config))
    raw = read_json(source / "config.json", HeadError, "restore the file")
    return head.layer_ids, named_layers(raw, raw.get("eagle_config") or {}) is not None


CARD = """---
base_model: {name}
tags: [speculative-decoding, eagle3]
---
# EAGLE-3 head for {name}

One layer, {config.draft_vocab_size} of {config.vocab_size} tokens, taps after layers {layers}. Converted by `dspark convert`.
"""
