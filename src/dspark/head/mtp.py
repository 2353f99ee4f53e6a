"""Multi-token-prediction modules that a target brings in its own checkpoint; transformers leaves them out when it loads the target.

Module k (from 0) has a slot t for every token. It reads, in slot t, what module k-1 said there (module 0: the target's own last
hidden state of token t) beside the embedding of token t+1+k, and its output gives the law of token t+2+k (DeepSeek-V3, section 2.2,
https://arxiv.org/abs/2412.19437). To go further than there are modules, the last one is applied to its own output, in the next slot.

Shapes: T slots of one pass, M tapped layers (the last one only), D hidden size, V vocabulary."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import modeling_layers
from transformers.cache_utils import MtpCache
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_utils import _get_resolved_checkpoint_files

from dspark.errors import HeadError
from dspark.head.recurrent import AnyHead, RecurrentHead
from dspark.target.target import PREFILL_ROWS, Target, final_norm

# Families whose modules hand on, and take from the target, the hidden state before its norm; the others take it after.
# Step: so in vLLM's and other engines' code for it, which say that drafts are nearly always wrong otherwise.
BEFORE_NORM = {"step3p5"}
LEAST_DRAFTED = 3  # tokens of a draft, if there are fewer modules; engines apply a single module two to four times

# What says that a checkpoint has modules: the projection of each, in the names of DeepSeek-V3 and Step, or of Qwen.
PROJECTION = re.compile(r"^(?P<prefix>.*?)layers\.(?P<layer>\d+)\.eh_proj\.weight$")
QWEN_PROJECTION = re.compile(r"^(?P<prefix>.*?mtp\.)fc\.weight$")
OWN_HEAD = re.compile(r"\.(transformer\.)?shared_head\.(head|output)\.weight$")
SHARED = re.compile(rf"({OWN_HEAD.pattern})|\.embed_tokens\.weight$")
MASKED = {"full_attention", "sliding_attention"}  # layers that transformers' modules can have
OTHERS = "use another drafter: dspark with a head, or lookup"
COMPARED_ROWS = 64  # of an output head, to see whether it is the target's


@dataclass(frozen=True)
class MtpConfig:
    """What its speed depends on."""

    family: str
    num_modules: int
    own_heads: int


@dataclass(frozen=True)
class Checkpoint:
    """Where in a target's files its modules are: `names` by file, and what transformers must be told of their layers."""

    prefixes: tuple[str, ...]  # of each module; Qwen's one module has the prefix `mtp.`
    files: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        return [name for names in self.files.values() for name in names]

    def of_module(self, k: int) -> list[str]:
        return [name for name in self.names if name.startswith(self.prefixes[k])]


class MtpModel(modeling_layers.MtpModel):
    """transformers' modules, told which names to load: its own list has the layer numbers of the released sizes only.

    It has the name of the class that it extends because transformers finds the renamings of a checkpoint by it."""

    checkpoint: Checkpoint
    _keys_to_ignore_on_load_unexpected = [r"shared_head", r"embed_tokens"]  # noqa: RUF012  the name and form transformers reads

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # else none of transformers' renamings would be applied

    @classmethod
    def get_mtp_weights_regex(cls, main_model) -> re.Pattern:  # type: ignore[override]
        names = (name for name in cls.checkpoint.names if not SHARED.search(name))
        return re.compile("|".join(rf"^{re.escape(name)}$" for name in names))

    def get_weight_conversions(self, main_model) -> list:
        step = WeightRenaming(source_patterns=r"\.transformer\.shared_head\.", target_patterns=".shared_head.")
        return [step, *super().get_weight_conversions(main_model)]


class MtpHead:
    """The modules of one target; `outputs` are their own output heads, None where it is the target's.

    Several requests may use it, each with its own cache (`start`)."""

    calibration = None  # it has no confidences
    draft_ids: torch.Tensor | None = None  # all tokens can be proposed

    def __init__(self, model: MtpModel, target: Target, outputs: Sequence[torch.Tensor | None]):
        self.model, self.outputs, self.norm = model, list(outputs), final_norm(target.model)
        self.before_norm = target.text_config.model_type in BEFORE_NORM
        self.norms = [cast(Any, layer).post_norm for layer in model.layers]
        for layer in model.layers:
            cast(Any, layer).use_post_norm = False  # what is handed on may be the state before it
        self.layer_ids = (target.num_layers - 1,)  # of the target that it reads
        own = sum(output is not None for output in self.outputs)
        self.config = MtpConfig(target.text_config.model_type, len(self.norms), own)
        self.block_size = max(self.num_modules, LEAST_DRAFTED)

    @property
    def num_modules(self) -> int:
        return len(self.norms)

    def start(self) -> MtpCache:
        """An empty cache: a layer for each module."""
        cache = MtpCache(config=self.model.config)
        cache.activate_past_recording()
        return cache

    def hidden(self, features_TMD: torch.Tensor) -> torch.Tensor:
        """What module 0 reads of the target [T, D]: its last layer's output, before or after the final norm."""
        hidden_TD = features_TMD[:, -1].to(self.norms[0].weight.dtype)
        return hidden_TD if self.before_norm else self.norm(hidden_TD)

    def run(self, k: int, hidden_TD: torch.Tensor, tokens: Sequence[int], slot: int, cache: MtpCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Append slots from `slot` on to the cache of module k: what it hands on [T, D], and logits [V] after the last slot."""
        parts = []
        for begin in range(0, len(tokens), PREFILL_ROWS):
            end = min(begin + PREFILL_ROWS, len(tokens))
            ids = torch.tensor([list(tokens[begin:end])], device=hidden_TD.device)
            # The position of a slot is that of the token it embeds.
            positions = torch.arange(slot + begin + 1 + k, slot + end + 1 + k, device=hidden_TD.device)[None]
            parts.append(self.model.forward_layer(k, hidden_TD[None, begin:end], positions, cache, input_ids=ids)[0])
        before_TD = torch.cat(parts)
        after_TD = self.norms[k](before_TD)
        output = self.outputs[k]
        last_1D = after_TD[-1:]
        logits_1V = self.model._project_to_logits(last_1D) if output is None else F.linear(last_1D, output)
        return before_TD if self.before_norm else after_TD, logits_1V[0].float()

    def forget(self, k: int, num_slots: int, cache: MtpCache) -> None:
        """Take the last slots of module k out of its cache; only those since the last call can be, so call it with 0 too."""
        cast(Any, cache.layers[k]).crop(-num_slots)


def stand_for_modules(target: Target, head: AnyHead) -> None:
    """From now on a trained head of the kind mtp or eagle3 is what the target has for modules: `load_mtp` and `own_mtp` give it, and so it
    drafts wherever modules would, beside a DSpark head too. Raises `HeadError` for a head of another kind."""
    if not isinstance(head, RecurrentHead):
        raise cannot_stand(head.kind)
    target.mtp = head


def cannot_stand(kind: str) -> HeadError:
    return HeadError(f"a head of the kind {kind} cannot stand for multi-token-prediction modules", "take one of the kind mtp or eagle3")


def load_mtp(target: Target) -> MtpHead | RecurrentHead:
    """The modules in the target's own checkpoint, loaded once, or what stands for them.

    Raises `HeadError` where there are none, or where they are of a kind that is not known."""
    if not target.mtp:
        target.mtp = read_mtp(target)
    return target.mtp


def own_mtp(target: Target, say: Callable[[str], None] = lambda text: None) -> MtpHead | RecurrentHead | None:
    """The modules, if the target's checkpoint is here and has some that can be read, else None; a word where they cannot be. Looked for
    once."""
    if target.mtp is None:
        target.mtp = False
        try:
            found = bool(find_modules(target, local=True).prefixes)
        except HeadError:
            found = False
        try:
            if found:
                load_mtp(target)
        except HeadError as error:
            say(f"drafting without them: {error.message}")
    return target.mtp or None


def read_mtp(target: Target) -> MtpHead:
    name, model = target.name or type(target.model).__name__, target.model
    checkpoint = find_modules(target)
    wanted = layer_settings(target, checkpoint)
    foreign = set(wanted.get("mtp_layer_types", [])) - MASKED
    if foreign:
        raise HeadError(
            f"the multi-token-prediction modules of {name} have layers of the kind {', '.join(sorted(foreign))}, "
            "for which transformers 5.23 makes no attention masks",
            OTHERS,
        )
    described: Any = type("MtpModel", (MtpModel,), {"checkpoint": checkpoint})
    try:
        with settings(target.text_config, wanted):
            modules = described.from_pretrained(model, device_map={"": target.device}).eval()
    except (RuntimeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HeadError(f"cannot read the multi-token-prediction modules of {name}: {reason}", OTHERS) from error
    if any(getattr(layer, "post_norm", None) is None for layer in modules.layers):
        raise HeadError(
            f"the multi-token-prediction modules of {name} share one output norm, a layout that is not known", "use another drafter"
        )
    modules.requires_grad_(False)
    return MtpHead(modules, target, own_outputs(target, checkpoint))


def find_modules(target: Target, local: bool = False) -> Checkpoint:
    """Where the modules are; `local`: the hub is not asked for files. Raises `HeadError` if the target has none."""
    name, where = target.name or type(target.model).__name__, target.model.config.name_or_path
    if not where:
        raise HeadError(f"{name} was not loaded from a checkpoint, where its multi-token-prediction modules would be", OTHERS)
    try:
        files, _ = _get_resolved_checkpoint_files(
            where,
            variant=None,
            gguf_file=None,
            use_safetensors=True,
            user_agent=None,
            is_remote_code=False,
            download_kwargs={"local_files_only": local},
        )
    except OSError as error:
        raise HeadError(f"no safetensors files of {name} to read multi-token-prediction modules from", OTHERS) from error
    found = {str(file): names_in(file) for file in files or []}
    prefixes = module_prefixes([n for names in found.values() for n in names], target.text_config.num_hidden_layers)
    if not prefixes:
        raise HeadError(f"the checkpoint of {name} has no multi-token-prediction modules", OTHERS)
    files_of = {file: [n for n in names if n.startswith(prefixes)] for file, names in found.items()}
    return Checkpoint(prefixes, {file: names for file, names in files_of.items() if names})


def module_prefixes(names: Sequence[str], num_layers: int) -> tuple[str, ...]:
    """Prefixes of the modules' tensors, in order; none where there is no module. Raises `HeadError` for a layout that is not known."""
    appended = sorted((int(m["layer"]), m["prefix"]) for m in map(PROJECTION.match, names) if m and int(m["layer"]) >= num_layers)
    if appended:
        return tuple(f"{prefix}layers.{layer}." for layer, prefix in appended)
    projections = [m["prefix"] for m in map(QWEN_PROJECTION.match, names) if m]
    layers = {n.removeprefix(prefix).split(".")[1] for prefix in projections for n in names if n.startswith(f"{prefix}layers.")}
    if len(layers) > 1:
        raise HeadError(f"a multi-token-prediction module of {len(layers)} layers is not known", OTHERS)
    return tuple(projections)


def names_in(file: str) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def layer_settings(target: Target, checkpoint: Checkpoint) -> dict[str, Any]:
    """What transformers' config must say of the modules' layers, where the checkpoint's does not say it."""
    config, count = target.text_config, len(checkpoint.prefixes)
    wanted: dict[str, Any] = {"num_mtp_layers": count}
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        usual = "full_attention" if "full_attention" in layer_types else layer_types[-1]
        wanted["mtp_layer_types"] = getattr(config, "mtp_layer_types", None) or [usual] * count
    if getattr(config, "mlp_layer_types", None) is not None and not getattr(config, "mtp_mlp_layer_types", None):
        wanted["mtp_mlp_layer_types"] = ["sparse" if any("expert" in n for n in checkpoint.of_module(k)) else "dense" for k in range(count)]
    heads = getattr(config, "num_sliding_attention_heads", None)
    if heads is not None:  # Step: sliding layers have more heads, and transformers tells that of the target's own layers only
        sliding = [k for k, kind in enumerate(wanted.get("mtp_layer_types", [])) if kind == "sliding_attention"]
        wanted["mtp_per_layer_config"] = {k: {"num_attention_heads": heads} for k in sliding}
    return wanted


@contextmanager
def settings(config: Any, wanted: dict[str, Any]) -> Iterator[None]:
    """Within it, the config says so; the user's model is as it was afterwards."""
    missing = object()
    before = {name: getattr(config, name, missing) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                delattr(config, name)
            else:
                setattr(config, name, value)


def own_outputs(target: Target, checkpoint: Checkpoint) -> list[torch.Tensor | None]:
    """Each module's output head [V, D] where it has one that is not the target's."""
    rows = torch.linspace(0, target.vocab_size - 1, min(COMPARED_ROWS, target.vocab_size)).long()
    outputs: list[torch.Tensor | None] = [None] * len(checkpoint.prefixes)
    for file, names in checkpoint.files.items():
        for name in filter(OWN_HEAD.search, names):
            with safe_open(file, framework="pt") as tensors:
                weight = tensors.get_tensor(name).to(target.model.dtype)
            k = next(k for k, prefix in enumerate(checkpoint.prefixes) if name.startswith(prefix))
            if weight.shape[0] != target.vocab_size or not torch.equal(weight[rows].float(), target.output_rows(rows).cpu()):
                outputs[k] = weight.to(target.device)
    return outputs
