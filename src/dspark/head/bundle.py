"""The DSpark head in a target's own checkpoint: DeepSeek-V4's DSpark releases have it as `mtp.0`, `mtp.1`, .., which transformers leaves
out at load. It is read here, in the released names and precisions; what it computes is in v4.py.

    mtp.k             a decoder layer each
    mtp.0 beside it   main_proj, main_norm: the context
    the last beside   hc_head, norm, markov_head, confidence_head

Embedding and output rows are the target's. Shapes: D hidden, H heads, E head dim, C residual streams, X experts, r Markov rank."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from dspark.config import MAX_BLOCK, HeadConfig
from dspark.errors import HeadError
from dspark.head.golden import refuse_broken
from dspark.prompts import read_json
from dspark.target.target import Target

if TYPE_CHECKING:
    from dspark.head.v4 import BundledHead

FAMILY = "deepseek_v4"
INDEX = "model.safetensors.index.json"
TENSOR = re.compile(r"^(?:model\.)?mtp\.(?P<layer>\d+)\.(?P<rest>.+)$")
OF_THE_FIRST, OF_THE_LAST = ("main_proj.", "main_norm."), ("norm.", "hc_head_", "markov_head.", "confidence_head.")
READ = (torch.float32, torch.bfloat16, torch.float16)
# FP8, and two FP4 numbers in a byte, beside a `scale` of their blocks.
QUANTIZED = (torch.float8_e4m3fn, torch.int8, torch.float4_e2m1fn_x2)
WAY_OUT = "restore the files, or decode without it: `--head none`"


@dataclass(frozen=True)
class BundledConfig(HeadConfig):
    """`window` is to the token, as such a head was trained; its keys are its values."""

    def first_seen(self, num_tokens: int) -> int:
        return max(0, num_tokens - self.window)

    @property
    def context_numbers(self) -> int:
        return self.num_hidden_layers * self.num_key_value_heads * self.head_dim


def describes_head(folder: Path) -> bool:
    """Does its config.json say that a head is in this checkpoint?"""
    try:
        raw = read_json(folder / "config.json", HeadError, "restore the file")
    except HeadError:  # none, or damaged: whoever needs it says so
        return False
    return isinstance(raw, dict) and raw.get("model_type") == FAMILY and bool(raw.get("dspark_block_size"))


def brings_head(folder: Path) -> bool:
    """Is there one? Conversions of a checkpoint may leave it out."""
    return describes_head(folder) and bool(places_in(folder))


def load_bundle(folder: Path, target: Target) -> "BundledHead":
    """The head in the checkpoint `folder`, which may be the target's own. Raises `HeadError` for another target, and for missing, extra,
    misshaped or unreadable tensors. Taps the target's layers."""
    config = target.text_config
    name = target.name or type(target.model).__name__
    if config.model_type != FAMILY:
        raise HeadError(f"the head in {folder} is for DeepSeek-V4, and {name} is {config.model_type}", "give a head of this target")
    tensors = read_bundle(folder)
    num_layers = 1 + max(place_of(official)[0] for official in tensors)
    head = bundled_config(read_json(folder / "config.json", HeadError, "restore the file"), config, num_layers, target, folder)
    refuse_other_tensors(tensors, shapes(config, head), folder)
    refuse_broken(tensors, f"the head in {folder} is damaged", WAY_OUT)
    from dspark.head.v4 import BundledHead, Modules  # transformers' modules of the family take a while to import

    layers = copy.deepcopy(config)
    layers.num_hidden_layers = num_layers
    layers.layer_types, layers.mlp_layer_types = ["sliding_attention"] * num_layers, ["moe"] * num_layers
    layers._experts_implementation = None  # transformers' choice for plain numbers, which all tensors are by now
    if hasattr(layers, "quantization_config"):
        del layers.quantization_config
    named = {as_decoder(official, num_layers): tensor for official, tensor in tensors.items()}
    dtype = target.model.get_input_embeddings().weight.dtype
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": target.device}, "output_loading_info": True}
    read: Any = Modules.from_pretrained(None, head, config=layers, state_dict=named, **options)
    modules, info = read
    lost = [str(name) for keys in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs") for name in info.get(keys) or ()]
    if lost:  # names and shapes are the released ones: this version renames them in another way
        raise HeadError(f"transformers {transformers.__version__} does not take in the head in {folder}: {lost[0]}", "try version 5.23")
    target.tap(head.target_layer_ids)
    return BundledHead(head, modules.requires_grad_(False), target).eval()


def places_in(folder: Path) -> dict[str, str]:
    """The head's tensors, as they are called there, and the files that hold them."""
    if (folder / INDEX).exists():
        raw = read_json(folder / INDEX, HeadError, "restore the file")
        places = raw.get("weight_map") if isinstance(raw, dict) else None
        if not isinstance(places, dict) or not all(isinstance(p, str) and Path(p).name == p for p in places.values()):
            raise HeadError(f"{folder / INDEX} is damaged: no weight_map of file names", "restore the file")
    else:
        places = {name: file.name for file in sorted(folder.glob("*.safetensors")) for name in read_file(file, None)}
    return {name: file for name, file in places.items() if TENSOR.match(name)}


def read_file(file: Path, wanted: list[str] | None) -> dict[str, Any]:
    """These tensors of a file; None: the names of all."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys()) if wanted is None else {name: tensors.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise HeadError(f"cannot read {file}: {error}", WAY_OUT) from error


def read_bundle(folder: Path) -> dict[str, torch.Tensor]:
    """The head's tensors in their released names, as plain numbers."""
    places = places_in(folder)
    if not places:
        raise HeadError(f"{folder} says that it brings a DSpark head, and has no tensors mtp.*", WAY_OUT)
    found: dict[str, torch.Tensor] = {}
    for file in sorted(set(places.values())):
        read = read_file(folder / file, [name for name, place in places.items() if place == file])
        found |= {name.removeprefix("model."): tensor for name, tensor in read.items()}
    scales = {name: found.pop(name) for name in list(found) if name.endswith(".scale")}
    for name, scale in scales.items():
        weight = name.removesuffix("scale") + "weight"
        if weight not in found:
            raise HeadError(f"{folder} has {name} without {weight}", WAY_OUT)
        if found[weight].dtype in READ:
            raise HeadError(f"{folder} has {name} beside {weight}, which is stored as plain numbers", WAY_OUT)
        if found[weight].dtype in QUANTIZED:
            found[weight] = dequantized(found[weight], scale, f"{folder}: {weight}")
    for name, tensor in found.items():
        if tensor.dtype not in READ:
            raise HeadError(
                f"{folder}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}{' without a scale' * (tensor.dtype in QUANTIZED)}",
                "a bundled head is read from float32, bfloat16 and float16, and from the releases' FP8 and FP4, with their scales",
            )
    return found


def dequantized(weight: torch.Tensor, scale: torch.Tensor, where: str) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    try:
        return Fp8Dequantize(None).convert({"weight": weight, "weight_scale_inv": scale})["weight"]  # type: ignore[return-value]
    except ValueError as error:
        raise HeadError(f"{where} does not fit its scale: {error}", WAY_OUT) from error


def bundled_config(raw: dict[str, Any], config: Any, num_layers: int, target: Target, folder: Path) -> BundledConfig:
    """Of the checkpoint's config.json, and of the target what is the target's. Raises `HeadError` for a senseless value."""
    values: dict[str, Any] = {
        name: raw.get(f"dspark_{name}") for name in ("block_size", "noise_token_id", "markov_rank", "target_layer_ids")
    }
    bounds = {"block_size": (1, MAX_BLOCK), "noise_token_id": (0, target.vocab_size - 1), "markov_rank": (1, target.vocab_size)}
    for name, (least, most) in bounds.items():
        if type(values[name]) is not int or not least <= values[name] <= most:
            raise HeadError(f"{folder}/config.json: dspark_{name} is {values[name]!r}, {least} to {most} was expected", "restore the file")
    taps = values["target_layer_ids"]
    sound = isinstance(taps, list) and taps and all(type(i) is int and 0 <= i < target.num_layers for i in taps)
    if not sound or taps != sorted(set(taps)):
        raise HeadError(
            f"{folder}/config.json: dspark_target_layer_ids is {taps!r}; ascending layers from 0 to {target.num_layers - 1} were expected",
            "restore the file",
        )
    return BundledConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=1,
        head_dim=config.head_dim,
        intermediate_size=config.moe_intermediate_size,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["main"]["rope_theta"],
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size,
        block_size=values["block_size"],
        mask_token_id=values["noise_token_id"],
        target_layer_ids=tuple(taps),
        num_target_layers=target.num_layers,
        markov_rank=values["markov_rank"],
        shortlist=target.vocab_size,  # its bias is nothing beside a pass of such a target
        window=config.sliding_window,
    )


def shapes(config: Any, head: HeadConfig) -> dict[str, tuple[int, ...]]:
    """Of every tensor of the head, in the released names."""
    D, H, E, C, X = config.hidden_size, config.num_attention_heads, config.head_dim, config.hc_mult, config.n_routed_experts
    Q, L, W, r = config.q_lora_rank, config.o_groups * config.o_lora_rank, config.moe_intermediate_size, head.markov_rank
    mixing = {"fn": ((2 + C) * C, C * D), "base": ((2 + C) * C,), "scale": (3,)}
    expert = {"w1": (W, D), "w2": (D, W), "w3": (W, D)}
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (D,), "ffn_norm.weight": (D,), "attn.attn_sink": (H,), "attn.wq_a.weight": (Q, D), "attn.q_norm.weight": (Q,),
        "attn.wq_b.weight": (H * E, Q), "attn.wkv.weight": (E, D), "attn.kv_norm.weight": (E,),
        "attn.wo_a.weight": (L, H * E // config.o_groups), "attn.wo_b.weight": (D, L), "ffn.gate.weight": (X, D), "ffn.gate.bias": (X,),
    }  # fmt: skip
    layer |= {f"hc_{part}_{name}": shape for part in ("attn", "ffn") for name, shape in mixing.items()}
    places = ["shared_experts", *(f"experts.{x}" for x in range(X))]
    layer |= {f"ffn.{place}.{name}.weight": shape for place in places for name, shape in expert.items()}
    first = {"main_proj.weight": (D, len(head.target_layer_ids) * D), "main_norm.weight": (D,)}
    last = {
        "norm.weight": (D,), "hc_head_fn": (C, C * D), "hc_head_base": (C,), "hc_head_scale": (1,), "confidence_head.proj.weight": (1, D + r),
        "markov_head.markov_w1.weight": (head.vocab_size, r), "markov_head.markov_w2.weight": (head.vocab_size, r),
    }  # fmt: skip
    num = head.num_hidden_layers
    every = {f"mtp.{k}.{name}": shape for k in range(num) for name, shape in layer.items()}
    every |= {f"mtp.0.{name}": shape for name, shape in first.items()}
    return every | {f"mtp.{num - 1}.{name}": shape for name, shape in last.items()}


def refuse_other_tensors(tensors: dict[str, torch.Tensor], wanted: dict[str, tuple[int, ...]], folder: Path) -> None:
    problems = [f"missing {name}" for name in wanted.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {wanted[name]}"
        for name in wanted.keys() & tensors.keys()
        if tuple(tensors[name].shape) != wanted[name]
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise HeadError(f"the head in {folder} does not fit its config: {'; '.join(sorted(problems)[:4])}{more}", WAY_OUT)


def place_of(name: str) -> tuple[int, str]:
    """Layer of a released name, and what follows."""
    found = TENSOR.match(name)
    assert found is not None
    return int(found["layer"]), found["rest"]


def as_decoder(name: str, num_layers: int) -> str:
    """A released name as transformers' renamings know it of a decoder."""
    k, rest = place_of(name)
    alone = (k == 0 and rest.startswith(OF_THE_FIRST)) or (k == num_layers - 1 and rest.startswith(OF_THE_LAST))
    return rest if alone else f"layers.{k}.{rest}"
