"""A head on disk: DeepSpec's names and layout, plus what makes it describe itself.

    config.json          the target's own config with DeepSpec's keys, and a `dspark` section
    model.safetensors    bfloat16; without the target's embedding and output rows, which are the target's own
    golden.safetensors   a short text and what the head drafts on it (golden.py): replayed at every load
    provenance.json      command, versions, data, time, measured figures
    README.md            the card
    calibration.json     temperatures of the confidences, once fitted

Heads of the other kinds (recurrent.py) have the same files, with their own tensors: eagle3 in SpecForge's names, mtp in DeepSeek-V3's,
and `kind` in the `dspark` section says which.

Files are written beside their places and renamed when all are whole: a full disk or a kill
never leaves half a head where a good one was."""

import functools
import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dspark.config import MAX_BLOCK, RECURRENT_KINDS, SEQUENTIAL_HEADS, HeadConfig, RecurrentConfig
from dspark.errors import HeadError
from dspark.head import calibration
from dspark.head.bundle import brings_head, describes_head, load_bundle
from dspark.head.golden import make_golden, refuse_broken, replay_golden
from dspark.head.head import Head
from dspark.head.recurrent import NETWORKS, AnyHead, RecurrentHead
from dspark.prompts import read_json
from dspark.target import demo, hub
from dspark.target.native.pages import copy, gather_weights, give_back_freed_memory, let_go, let_go_of_all, mapped_checkpoints
from dspark.target.target import Target

OWN_KEYS = [f.name for f in fields(HeadConfig)]
for key, before in (("num_hidden_layers", "num_attention_heads"), ("mask_token_id", "target_layer_ids")):  # DeepSpec's order, in files
    OWN_KEYS.insert(OWN_KEYS.index(before), OWN_KEYS.pop(OWN_KEYS.index(key)))
IN_SECTION = ("draft_vocab_size", "shortlist", "window")  # DeepSpec has no such keys
RECURRENT_KEYS = [f.name for f in fields(RecurrentConfig)]
ONLY_OURS = ("kind", "block_size", "target_layer_ids", "num_target_layers", "trained_steps")  # of them; the others are the layer's own
ARCHITECTURES = {"mtp": "DSparkMtpModel", "eagle3": "LlamaForCausalLMEagle3"}
# The calibration comes last: not every head has one, so no failure can leave a new one with an old head.
FILES = ("model.safetensors", "golden.safetensors", "config.json", "provenance.json", "README.md", calibration.NAME)
# Sizes beyond these come from a damaged file; their products still are numbers that torch can hold.
MOST = {"block_size": MAX_BLOCK, "num_hidden_layers": 256}
MOST_OF_A_SIZE = 2**20
# Of the target's config: the first is a path of this machine, the others would misdescribe the head's layers.
NOT_THE_HEADS = ("_name_or_path", "quantization_config", "partial_rotary_factor", "rope_scaling", "sliding_window")
VOCABULARY_MAPS = ("draft_ids", "d2t", "t2d")  # tensors beside the weights that say which tokens a head can propose
CARRIED = "dspark"  # the folder in an exported head where what only dspark reads lies out of the way of other loaders
SHARED = ("embed_tokens.weight", "lm_head.weight")  # DeepSpec saves copies of the target's; we need none
WHAT_A_HEAD_IS = "give a folder with config.json and model.safetensors, as `dspark train TARGET --out DIR` writes it, or a hub id"


def vocabulary_hash(target: Target) -> str | None:
    if target.tokenizer is None:
        return None
    vocabulary = sorted(target.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def config_json(own_config: HeadConfig | RecurrentConfig, target: Target) -> dict:
    """DeepSpec's config.json: the target's own, then the head's keys over it. Of another kind of head: its layer's, as SpecForge has it."""
    if isinstance(own_config, RecurrentConfig):
        return recurrent_json(own_config, target)
    config = target.text_config.to_dict()
    for key in NOT_THE_HEADS:
        config.pop(key, None)
    own = {key: getattr(own_config, key) for key in OWN_KEYS if key not in IN_SECTION}
    config |= own | {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "target_layer_ids": list(own_config.target_layer_ids),
        "layer_types": ["full_attention"] * own_config.num_hidden_layers,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "num_anchors": 512,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": own_config.rope_theta},
        "dspark": section_json(target, SHARED) | {key: getattr(own_config, key) for key in IN_SECTION},
    }
    return config


def section_json(target: Target, shared: Sequence[str]) -> dict:
    """What a head says of itself and its target."""
    return {
        "format": 1,
        "target": target.name,
        "target_model_type": target.text_config.model_type,
        "vocabulary_sha256": vocabulary_hash(target),
        "shared_with_target": list(shared),
    }


def recurrent_json(own: RecurrentConfig, target: Target) -> dict:
    """config.json of a head of one recurrent layer: a Llama's of one layer, and what is ours in the `dspark` section."""
    layer = {key: getattr(own, key) for key in RECURRENT_KEYS if key not in ONLY_OURS}
    shared = SHARED if own.kind == "mtp" else SHARED[:1]
    return layer | {
        "architectures": [ARCHITECTURES[own.kind]],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "max_position_embeddings": min(target.max_context, 2**31 - 1),
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "dspark": section_json(target, shared) | {key: getattr(own, key) for key in ONLY_OURS},
    }


def save_head(
    head: AnyHead,
    target: Target,
    folder: Path,
    golden_ids: list[int],
    provenance: dict,
    card: str,
    precisions: Mapping[str, torch.dtype] | None = None,
    golden: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a head that `load_head` accepts, in bfloat16 where `precisions` say nothing else of a tensor. Its golden vectors
    are made on a text that begins with `golden_ids`, unless there are some. A link in the folder gives way to a file, and what it points to
    stays as it is: other heads may share it, and files are renamed into place together, which no two file systems do. Raises `HeadError` when the disk is full or closed to us."""
    if isinstance(head, Head) and head.bundled:
        raise only_read(target.name or "this")
    precisions = precisions or {}
    weights = {name: tensor.detach().to(precisions.get(name, torch.bfloat16)).contiguous() for name, tensor in head.state_dict().items()}
    weights |= vocabulary_map(head)
    refuse_broken(weights, "nothing was saved", "lower the learning rate")
    # Golden logits come from the rounded weights, which are what a reader will have.
    rounded = empty_head(head.config, head.draft_ids, target)
    rounded.load_state_dict({k: v.float() for k, v in weights.items() if k not in VOCABULARY_MAPS})
    golden = golden or make_golden(rounded, target, golden_ids)
    if not all(0 < golden[name].float().std() < float("inf") for name in ("hidden", "logits") if name in golden):
        raise HeadError(
            "nothing was saved: the head's logits are all alike, or not numbers; its training diverged", "lower the learning rate"
        )
    texts = {
        "config.json": json.dumps(config_json(head.config, target), indent=2, default=str) + "\n",
        "provenance.json": json.dumps(provenance, indent=2) + "\n",
        "README.md": card,
    }
    if head.calibration is not None:
        texts[calibration.NAME] = calibration.as_text(head.calibration)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        undo_interrupted_save(folder)  # its files would pass for those of this save
        stale = folder / f"{calibration.NAME}.partial"
        if stale.exists():  # of a killed save; this one may have none to write over it
            stale.unlink()
        for name, tensors in (("model.safetensors", weights), ("golden.safetensors", golden)):
            save_file(tensors, folder / f"{name}.partial", metadata={"format": "pt"})
        for name, text in texts.items():
            (folder / f"{name}.partial").write_text(text, encoding="utf-8")
        replace_all(folder, [name for name in FILES if name in texts or name.endswith(".safetensors")])
    except (OSError, SafetensorError) as error:
        for leftover in folder.glob("*.partial"):
            leftover.unlink(missing_ok=True)
        raise HeadError(f"cannot save the head to {folder}: {error}", "free some space or choose another --out") from error


def vocabulary_map(head: AnyHead) -> dict[str, torch.Tensor]:
    """Tensors that say which tokens a head of a reduced vocabulary can propose, as its kind has them."""
    ids, reduced = head.draft_ids.cpu(), head.config.draft_vocab_size < head.config.vocab_size
    if head.kind != "eagle3":
        return {"draft_ids": ids.int()} if reduced else {}
    t2d = torch.zeros(head.config.vocab_size, dtype=torch.bool)
    t2d[ids] = True
    return {"d2t": ids - torch.arange(len(ids)), "t2d": t2d}


def replace_all(folder: Path, names: Sequence[str]) -> None:
    """Put every NAME.partial in the place of the old files, or none of them: a failed rename brings those back."""
    kept = [name for name in FILES if (folder / name).exists()]
    try:
        for name in kept:
            os.replace(folder / name, folder / f"{name}.old")
        for name in names:
            os.replace(folder / f"{name}.partial", folder / name)
    except OSError:
        for name in kept:
            if (folder / f"{name}.old").exists():
                os.replace(folder / f"{name}.old", folder / name)
        raise
    for name in kept:
        (folder / f"{name}.old").unlink()


def undo_interrupted_save(folder: Path) -> None:
    """A kill within `replace_all` leaves some NAME.old behind. If the new head is not whole, bring the old one back,
    whole; else finish by deleting what is left of the old one."""
    try:
        kept = [name for name in FILES if (folder / f"{name}.old").exists()]
        whole = all((folder / name).exists() for name in ("model.safetensors", "config.json"))
        interrupted = not whole or any((folder / f"{name}.partial").exists() for name in FILES)
        for name in kept:
            if interrupted:
                os.replace(folder / f"{name}.old", folder / name)
            else:
                (folder / f"{name}.old").unlink()
    except OSError as error:
        raise HeadError(f"cannot tidy {folder} after an interrupted save: {error}", "make the folder writable") from error


def read_config(folder: Path) -> tuple[HeadConfig, dict]:
    """The shape of a DSpark or DFlash head and its `dspark` section, after an interrupted save was undone.

    Raises `HeadError` naming what is missing or unknown, or another kind of head."""
    config, section = read_any_config(folder)
    if isinstance(config, RecurrentConfig):
        raise another_kind(config.kind, str(folder))
    return config, section


def another_kind(kind: str, where: str) -> HeadError:
    return HeadError(
        f"{where} is a head of the kind {kind}; this takes DSpark and DFlash heads",
        "`dspark generate`, `bench`, `verify` and `inspect` take all kinds",
    )


def dspark_only(head: AnyHead, where: str | Path) -> Head:
    """The head. Raises `HeadError` for one of another kind than DSpark and DFlash."""
    if isinstance(head, RecurrentHead):
        raise another_kind(head.kind, str(where))
    return head


def refuse_bundled(folder: Path) -> None:
    """Raise `HeadError` for a target's checkpoint that brings a head."""
    if describes_head(folder):
        raise only_read(folder)


def only_read(where: str | Path) -> HeadError:
    return HeadError(
        f"{where} is a target's own checkpoint; the DSpark head that it brings is only read, not trained, calibrated, saved or converted",
        "`dspark generate`, `chat`, `serve`, `bench`, `verify` and `profile` draft with it",
    )


def read_any_config(folder: Path) -> tuple[HeadConfig | RecurrentConfig, dict]:
    """`read_config` for every kind of head."""
    refuse_bundled(folder)
    undo_interrupted_save(folder)
    if not (folder / "config.json").exists():
        on = way_on(folder)
        hint = f"its run goes on with `{on}`" if on else WHAT_A_HEAD_IS
        raise HeadError(f"no head in {folder.absolute()}: it holds no config.json", hint)
    raw = read_json(folder / "config.json", HeadError, "restore the file, or train the head again")
    section = raw.get("dspark", {}) if isinstance(raw, dict) else None
    rope = (raw.get("rope_parameters") or {}) if isinstance(raw, dict) else None
    if not isinstance(section, dict) or not isinstance(rope, dict):
        raise HeadError(f"{folder}/config.json is damaged: an object was expected", "restore the file, or train the head again")
    if "kind" in section:
        return recurrent_config(raw, section, f"{folder}/config.json"), section
    refuse_other_formats(raw, folder)
    if not section:
        refuse_other_networks(raw, f"{folder}/config.json")
    values = {key: raw.get(key) for key in OWN_KEYS if key not in IN_SECTION}
    values["rope_theta"] = values["rope_theta"] or rope.get("rope_theta")
    values["draft_vocab_size"] = section.get("draft_vocab_size", raw.get("vocab_size"))
    values |= {name: section.get(name, 0) for name in ("shortlist", "window")}
    return checked_config(values, f"{folder}/config.json"), section


def way_on(folder: Path) -> str | None:
    """The command that goes on with the run which makes the head in this folder; None where none is, or it was finished: a run measures
    its head at the end, and one that is saved before that loads like any other. A damaged record of one is for the run itself to tell."""
    run, record = folder / "progress" / "settings.json", folder / "provenance.json"
    try:
        if not run.exists() or (record.exists() and json.loads(record.read_text(encoding="utf-8")).get("held_out_rounds")):
            return None
        begun = shlex.split(json.loads(run.read_text(encoding="utf-8"))["command"])
        return shlex.join([*begun[: begun.index("--out")], "--out", str(folder), "--resume"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def kind_in(folder: Path) -> str:
    """The kind of the head in a folder, by its config.json alone. Raises `HeadError` where there is no head."""
    if describes_head(folder):
        return "dspark"
    config, _ = read_any_config(folder)
    return config.kind if isinstance(config, RecurrentConfig) else "dspark" if config.markov_rank else "dflash"


def recurrent_config(raw: dict, section: dict, where: str) -> RecurrentConfig:
    """Raises `HeadError` naming what is missing, unknown or senseless."""
    values: dict[str, Any] = {key: (section if key in ONLY_OURS else raw).get(key) for key in RECURRENT_KEYS}
    if values["kind"] not in RECURRENT_KINDS:
        raise HeadError(f"{where}: unknown kind of head {values['kind']!r}; known: {', '.join(RECURRENT_KINDS)}")
    refuse_missing(values, where)
    refuse_other_networks(raw, where)
    refuse_senseless(values, where, RecurrentConfig)
    refuse_layers(values, where)
    if values["kind"] == "mtp" and values["target_layer_ids"] != (values["num_target_layers"] - 1,):
        raise HeadError(f"{where}: an mtp head reads the target's last layer, not {list(values['target_layer_ids'])}", "restore the file")
    return RecurrentConfig(**values)


def refuse_missing(values: dict, where: str) -> None:
    missing = [key for key, value in values.items() if value is None]
    if missing:
        raise HeadError(f"{where} lacks {', '.join(missing)}", "is this a DSpark head?")
    if not isinstance(values["target_layer_ids"], (list, tuple)):
        raise HeadError(f"{where}: target_layer_ids is {values['target_layer_ids']!r}, a list was expected")
    values["target_layer_ids"] = tuple(values["target_layer_ids"])


def refuse_layers(values: dict, where: str) -> None:
    if not all(-1 <= i < values["num_target_layers"] for i in values["target_layer_ids"]):
        raise HeadError(
            f"{where}: target_layer_ids {values['target_layer_ids']} are not all layers of a target with {values['num_target_layers']}",
            "dspark and DeepSpec count the outputs of layers from 0, speculators and GGUF one higher: were these not converted?",
        )


def checked_config(values: dict, where: str) -> HeadConfig:
    """The configuration made of values by name, that a file `where` gave.

    Raises `HeadError` naming what is missing, unknown or senseless."""
    values = dict(values)
    if values["markov_rank"] == 0:
        values["markov_head_type"] = values["markov_head_type"] or "vanilla"
    refuse_missing(values, where)
    if values["markov_head_type"] not in SEQUENTIAL_HEADS:
        raise HeadError(f"unknown markov_head_type {values['markov_head_type']!r}; known: {', '.join(SEQUENTIAL_HEADS)}")
    refuse_senseless(values, where)
    if not 0 <= values["mask_token_id"] < values["vocab_size"]:
        raise HeadError(f"{where}: mask_token_id {values['mask_token_id']} is outside the vocabulary of {values['vocab_size']}")
    refuse_layers(values, where)
    return HeadConfig(**values)


def refuse_other_formats(raw: dict, folder: Path) -> None:
    """Raise `HeadError` with the way out for folders of speculators and SpecForge, and for EAGLE-3 heads of others."""
    name = "speculators" if "speculators_model_type" in raw else "SpecForge" if "dflash_config" in raw else None
    name = "EAGLE-3" if any("Eagle3" in str(each) for each in raw.get("architectures") or []) else name
    if name:
        raise HeadError(f"{folder} is a head in the format of {name}", f"convert it first: `dspark convert {folder} DIR --target TARGET`")


def refuse_other_networks(layers: dict, where: str) -> None:
    """Raise `HeadError` for draft layers that dspark does not compute, by the config of another project."""
    rope = layers.get("rope_parameters") or layers.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    types = layers.get("layer_types") or []
    other = [t for t in (types if isinstance(types, list) else [types]) if t != "full_attention"]
    reasons = [f"{len(other)} draft layers with {other[0]}"] if other else []
    if kind != "default":
        reasons.append(f"positions scaled by {kind!r} (rope)")
    if layers.get("attention_bias"):
        reasons.append("biases in its attention (attention_bias)")
    if layers.get("hidden_act", "silu") != "silu":
        reasons.append(f"the activation {layers['hidden_act']!r}")
    if reasons:
        raise HeadError(
            f"{where}: a head with {' and '.join(reasons)}", "dspark runs full attention, plain rotary positions, SiLU, no biases"
        )


def refuse_senseless(values: dict, where: str, shape: type[HeadConfig] | type[RecurrentConfig] = HeadConfig) -> None:
    """Raise `HeadError` for a value of another type than `shape` says, or a size below 1 or absurdly large."""
    for field in fields(shape):
        value = values[field.name] if field.name != "target_layer_ids" else None
        if field.type is bool:
            sound = isinstance(value, bool)
        elif field.type in (int, float):
            lowest = 0 if field.name in ("markov_rank", "mask_token_id", "shortlist", "window") else 1 if field.type is int else 1e-30
            most = 2**31 if field.type is float else MOST.get(field.name, MOST_OF_A_SIZE)
            sound = isinstance(value, (int, field.type)) and not isinstance(value, bool) and lowest <= value <= most
        else:
            sound = True
        if not sound:
            raise HeadError(f"{where}: {field.name} is {value!r}", "restore the file, or train the head again")
    layers = values["target_layer_ids"]
    if not layers or not all(type(i) is int for i in layers) or list(layers) != sorted(set(layers)):
        raise HeadError(f"{where}: target_layer_ids {list(layers)} are not ascending layer numbers")
    if values["num_attention_heads"] % values["num_key_value_heads"]:
        raise HeadError(f"{where}: {values['num_key_value_heads']} key heads do not divide {values['num_attention_heads']} heads")
    if values["draft_vocab_size"] > values["vocab_size"]:
        raise HeadError(f"{where}: draft_vocab_size {values['draft_vocab_size']} exceeds the vocabulary of {values['vocab_size']}")


def load_head(folder: str | Path, target: Target, calibrated: bool = True, same_target: bool = True) -> AnyHead:
    """Load a head for this target and prove that it is the head, and the target, it was trained as. Of any kind: `head.kind` says which.

    `folder` may also be a hub id or the name of a shipped head, or the checkpoint of a target that brings a head (bundle.py), which has
    neither golden vectors nor a calibration. Raises `HeadError` where there is none, for
    missing, extra or misshaped tensors, another target, another vocabulary, golden vectors that do not come
    out again, or a calibration of another pair (which `calibrated=False` leaves unread). Taps the target's layers.
    `same_target=False` takes a target of other weights, to adapt the head to: of the golden vectors only what the head
    computes without the target's weights is then replayed, and there is no `self_test`."""
    folder = named_head(folder)
    if describes_head(folder):
        return load_bundle(folder, target)
    config, section = read_any_config(folder)
    refuse_other_target(config, section, target)
    weights = read_weights(folder)
    refuse_broken(weights, f"{folder}/model.safetensors is damaged", "restore the file, or train the head again")
    let_go_of_all(weights.values())
    if isinstance(config, HeadConfig):  # heads of other projects bring copies of these; an EAGLE-3 head has output rows of its own
        for name in SHARED:
            weights.pop(name, None)
    draft_ids = read_vocabulary_map(config, weights, f"{folder}/model.safetensors")
    refuse_other_tensors(config, weights, f"{folder}/model.safetensors")
    head = empty_head(config, draft_ids, target)
    fill(head, weights)
    target.tap(config.target_layer_ids)
    golden = golden_file(folder)
    if section or golden.exists():  # heads of other projects come without
        head.self_test = replay_golden(head, target, read_tensors(golden), folder, same_target)
    if isinstance(head, Head):
        head.calibration = calibration.read_calibration(folder, head.config.block_size) if calibrated else None
        if head.calibration is not None:
            calibration.refuse_other_pair(head.calibration, head, target, folder)
    for part in (*head.children(), head):  # one after the other: the float32 of each is gone before the next one's copy comes
        part.to(device=target.device, dtype=target.model.dtype)
        give_back_freed_memory()
    head.eval()
    if target.runtime is not None:
        gather_weights(head)
    return head


def fill(head: AnyHead, weights: dict[str, torch.Tensor]) -> None:
    """Copy the tensors of the file, whose names and shapes are known to be the head's; what is copied is let go."""
    release = functools.partial(let_go, mapped=mapped_checkpoints())
    for name, place in head.state_dict().items():
        copy(weights[name], place, release)
    give_back_freed_memory()


def read_vocabulary_map(config: HeadConfig | RecurrentConfig, weights: dict[str, torch.Tensor], where: str) -> torch.Tensor:
    """Take what `vocabulary_map` wrote out of the tensors; the target ids of the draft vocabulary [Vd]. Raises `HeadError`."""
    ids = torch.arange(config.draft_vocab_size)
    if isinstance(config, RecurrentConfig) and config.kind == "eagle3":
        missing = [name for name in ("d2t", "t2d") if name not in weights]
        if missing:
            raise HeadError(f"{where} lacks {' and '.join(missing)}", "restore the file, or train the head again")
        d2t, t2d = weights.pop("d2t"), weights.pop("t2d")
        fits = d2t.shape == ids.shape and t2d.shape == (config.vocab_size,) and not d2t.is_floating_point()
        if not fits or not torch.equal(t2d.nonzero().flatten(), ids + d2t.long()):
            raise HeadError(
                f"{where}: d2t and t2d do not name {config.draft_vocab_size} of {config.vocab_size} tokens alike",
                "d2t holds offsets, the target's id minus the draft's: restore the file",
            )
        return ids + d2t.long()
    draft_ids = weights.pop("draft_ids", ids).long()
    within = draft_ids.shape == (config.draft_vocab_size,) and bool(((draft_ids >= 0) & (draft_ids < config.vocab_size)).all())
    if not within or len(draft_ids.unique()) < len(draft_ids):  # a token named twice would have two laws
        raise HeadError(
            f"{where}: draft_ids do not fit a draft vocabulary of {config.draft_vocab_size} out of {config.vocab_size}",
            "restore the file, or train the head again",
        )
    return draft_ids


def golden_file(folder: Path) -> Path:
    """Where the golden vectors of a head lie, or would."""
    carried = folder / CARRIED / "golden.safetensors"
    return carried if carried.exists() else folder / "golden.safetensors"


@overload
def empty_head(config: HeadConfig, draft_ids: torch.Tensor, target: Target) -> Head: ...
@overload
def empty_head(config: HeadConfig | RecurrentConfig, draft_ids: torch.Tensor, target: Target) -> AnyHead: ...
def empty_head(config: HeadConfig | RecurrentConfig, draft_ids: torch.Tensor, target: Target) -> AnyHead:
    """A head whose weights are NaN, so that one that is never loaded shouts."""
    rows = target.output_rows(draft_ids).cpu()
    mask = torch.empty(0)
    if isinstance(config, HeadConfig):
        mask = target.embed(torch.tensor(config.mask_token_id, device=target.device)).detach().float().cpu()
    with torch.device("meta"):  # no memory yet, so no time for random numbers that nobody reads
        head = network(config, draft_ids, rows, mask, target.embed)
    for module in head.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.full(parameter.shape, float("nan")), requires_grad=False)
    return head.eval()


def network(config: HeadConfig | RecurrentConfig, draft_ids: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor, embed: Any) -> AnyHead:
    """The network of this shape, whatever its weights."""
    if isinstance(config, RecurrentConfig):
        return NETWORKS[config.kind](config, draft_ids, rows, embed)
    return Head(config, draft_ids, rows, mask)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise HeadError(f"cannot read {path}: {error}", "restore the file, or train the head again") from error


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the files that its index names. Raises `HeadError` if some are not there."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return read_tensors(folder / "model.safetensors")
    raw = read_json(index, HeadError, "restore the file")
    places = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(places, dict) or not all(isinstance(p, str) and Path(p).name == p for p in places.values()):
        raise HeadError(f"{index} is damaged: no weight_map of file names", "restore the file")
    found: dict[str, torch.Tensor] = {}
    for place in sorted(set(places.values())):
        found |= read_tensors(folder / place)
    missing = sorted(places.keys() - found.keys())
    if missing:
        raise HeadError(f"{folder}: {places[missing[0]]} lacks {', '.join(missing[:4])}, which the index says it holds", "restore the file")
    return found


def refuse_other_target(config: HeadConfig | RecurrentConfig, section: dict, target: Target) -> None:
    name = target.name or type(target.model).__name__
    hint = f"train one for this target: `dspark train {target.name or 'TARGET'} --out DIR`"
    pairs = (("hidden size", config.hidden_size, target.hidden_size), ("layers", config.num_target_layers, target.num_layers),
             ("vocabulary of", config.vocab_size, target.vocab_size))  # fmt: skip
    for what, trained, found in pairs:
        if trained != found:
            raise HeadError(f"head was trained for {what} {trained}, target {name} has {found}", hint)
    expected, found_hash = section.get("vocabulary_sha256"), vocabulary_hash(target)
    if expected and found_hash and expected != found_hash:
        raise HeadError(f"head was trained with another tokenizer than that of target {name}", hint)


def refuse_other_tensors(config: HeadConfig | RecurrentConfig, weights: dict[str, torch.Tensor], where: str) -> None:
    with torch.device("meta"):  # shapes alone: a damaged config may ask for more than there is memory
        none = torch.empty(0)
        head = network(config, none, none, none, None)
    wanted = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    problems = [f"missing {name}" for name in wanted.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {found[name]} instead of {wanted[name]}" for name in wanted.keys() & found.keys() if wanted[name] != found[name]
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise HeadError(
            f"{where} does not fit its config: {'; '.join(sorted(problems)[:4])}{more}",
            "restore the file, or train the head again",
        )


def find_head(name: str | Path | None, target_name: str) -> Path | None:
    """The folder of a head given by path or hub id, or the one shipped for this target, or the target's own checkpoint where that brings
    a head; None if there is none."""
    if name is not None:
        return named_head(name)
    own = checkpoint_of(target_name)
    return shipped_head(target_name) or (own if own is not None and brings_head(own) else None)


def checkpoint_of(target_name: str) -> Path | None:
    """The folder of a target's checkpoint, if it is here already."""
    path = Path(target_name).expanduser()
    if path.is_dir() or "/" not in target_name or target_name.startswith((".", "/", "~")):
        return path if path.is_dir() else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(target_name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def named_head(name: str | Path) -> Path:
    """The folder of a head given by path, hub id, or the name of a shipped one. Raises `HeadError` if there is none."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    shipped = shipped_head(str(name))
    if shipped is not None:
        return shipped
    if path.exists():
        gguf = f"convert it first: `dspark convert {name} DIR --target TARGET`"
        raise HeadError(f"{name} is a file", gguf if path.suffix == ".gguf" else WHAT_A_HEAD_IS)
    if "/" in str(name) and not str(name).startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(str(name), local_files_only=not hub.answers()))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0] if hub.answers() else "it cannot be reached"
            raise HeadError(
                f"no head {name}: {path.absolute()} is no folder, and the hub does not give it: {reason}", WHAT_A_HEAD_IS
            ) from error
    raise HeadError(f"no head at {name}: {path.absolute()} is no folder", WHAT_A_HEAD_IS)


def shipped_head(target_name: str) -> Path | None:
    """The head that comes with dspark for a target's short name or hub id."""
    name = demo.NAME if target_name == demo.HUB_ID else target_name
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        return None
    places = [Path(__file__).parents[i] / "heads" / name for i in (1, 3)]  # installed, and in a checkout
    return next((place for place in places if (place / "config.json").exists()), None)
