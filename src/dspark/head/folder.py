"""A head on disk: DeepSpec's names and layout, plus what makes it describe itself.

    config.json          the target's own config with DeepSpec's keys, and a `dspark` section
    model.safetensors    bfloat16; without the target's embedding and output rows, which are the target's own
    golden.safetensors   a short text and what the head drafts on it (golden.py): replayed at every load
    provenance.json      command, versions, data, time, measured figures
    README.md            the card
    calibration.json     temperatures of the confidences, once fitted

Files are written beside their places and renamed when all are whole: a full disk or a kill
never leaves half a head where a good one was."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dspark.config import MAX_BLOCK, SEQUENTIAL_HEADS, HeadConfig
from dspark.errors import HeadError
from dspark.head import calibration
from dspark.head.golden import make_golden, refuse_broken, replay_golden
from dspark.head.head import Head
from dspark.prompts import read_json
from dspark.target import demo, hub
from dspark.target.native.pages import gather_weights
from dspark.target.target import Target

OWN_KEYS = [f.name for f in fields(HeadConfig)]
IN_SECTION = ("draft_vocab_size", "shortlist", "window")  # DeepSpec has no such keys
# The calibration comes last: not every head has one, so no failure can leave a new one with an old head.
FILES = ("model.safetensors", "golden.safetensors", "config.json", "provenance.json", "README.md", calibration.NAME)
# Sizes beyond these come from a damaged file; their products still are numbers that torch can hold.
MOST = {"block_size": MAX_BLOCK, "num_hidden_layers": 256}
MOST_OF_A_SIZE = 2**20
# Of the target's config: the first is a path of this machine, the others would misdescribe the head's layers.
NOT_THE_HEADS = ("_name_or_path", "quantization_config", "partial_rotary_factor", "rope_scaling", "sliding_window")
CARRIED = "dspark"  # the folder in an exported head where what only dspark reads lies out of the way of other loaders
SHARED = ("embed_tokens.weight", "lm_head.weight")  # DeepSpec saves copies of the target's; we need none
WHAT_A_HEAD_IS = "give a folder with config.json and model.safetensors, as `dspark train TARGET --out DIR` writes it, or a hub id"


def vocabulary_hash(target: Target) -> str | None:
    if target.tokenizer is None:
        return None
    vocabulary = sorted(target.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def config_json(own_config: HeadConfig, target: Target) -> dict:
    """DeepSpec's config.json: the target's own, then the head's keys over it."""
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
        "dspark": {
            "format": 1,
            "target": target.name,
            "target_model_type": target.text_config.model_type,
            "vocabulary_sha256": vocabulary_hash(target),
            "shared_with_target": list(SHARED),
            **{key: getattr(own_config, key) for key in IN_SECTION},
        },
    }
    return config


def save_head(
    head: Head,
    target: Target,
    folder: Path,
    golden_ids: list[int],
    provenance: dict,
    card: str,
    precisions: Mapping[str, torch.dtype] | None = None,
    golden: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a head that `load_head` accepts, in bfloat16 where `precisions` say nothing else of a tensor. Its golden vectors
    are made on a text that begins with `golden_ids`, unless there are some. Raises `HeadError` when the disk is full or closed to us."""
    precisions = precisions or {}
    weights = {name: tensor.detach().to(precisions.get(name, torch.bfloat16)).contiguous() for name, tensor in head.state_dict().items()}
    if head.config.draft_vocab_size < head.config.vocab_size:
        weights["draft_ids"] = head.draft_ids.int()
    refuse_broken(weights, "nothing was saved", "lower the learning rate")
    # Golden logits come from the rounded weights, which are what a reader will have.
    rounded = empty_head(head.config, head.draft_ids, target)
    rounded.load_state_dict({k: v.float() for k, v in weights.items() if k != "draft_ids"})
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
    """The head's shape and its `dspark` section, after an interrupted save was undone.

    Raises `HeadError` naming what is missing or unknown."""
    undo_interrupted_save(folder)
    if not (folder / "config.json").exists():
        raise HeadError(f"no head in {folder.absolute()}: it holds no config.json", WHAT_A_HEAD_IS)
    raw = read_json(folder / "config.json", HeadError, "restore the file, or train the head again")
    section = raw.get("dspark", {}) if isinstance(raw, dict) else None
    rope = (raw.get("rope_parameters") or {}) if isinstance(raw, dict) else None
    if not isinstance(section, dict) or not isinstance(rope, dict):
        raise HeadError(f"{folder}/config.json is damaged: an object was expected", "restore the file, or train the head again")
    refuse_other_formats(raw, folder)
    if not section:
        refuse_other_networks(raw, f"{folder}/config.json")
    values = {key: raw.get(key) for key in OWN_KEYS if key not in IN_SECTION}
    values["rope_theta"] = values["rope_theta"] or rope.get("rope_theta")
    values["draft_vocab_size"] = section.get("draft_vocab_size", raw.get("vocab_size"))
    values |= {name: section.get(name, 0) for name in ("shortlist", "window")}
    return checked_config(values, f"{folder}/config.json"), section


def checked_config(values: dict, where: str) -> HeadConfig:
    """The configuration made of values by name, that a file `where` gave.

    Raises `HeadError` naming what is missing, unknown or senseless."""
    values = dict(values)
    if values["markov_rank"] == 0:
        values["markov_head_type"] = values["markov_head_type"] or "vanilla"
    missing = [key for key, value in values.items() if value is None]
    if missing:
        raise HeadError(f"{where} lacks {', '.join(missing)}", "is this a DSpark head?")
    if values["markov_head_type"] not in SEQUENTIAL_HEADS:
        raise HeadError(f"unknown markov_head_type {values['markov_head_type']!r}; known: {', '.join(SEQUENTIAL_HEADS)}")
    if not isinstance(values["target_layer_ids"], (list, tuple)):
        raise HeadError(f"{where}: target_layer_ids is {values['target_layer_ids']!r}, a list was expected")
    values["target_layer_ids"] = tuple(values["target_layer_ids"])
    refuse_senseless(values, where)
    if not 0 <= values["mask_token_id"] < values["vocab_size"]:
        raise HeadError(f"{where}: mask_token_id {values['mask_token_id']} is outside the vocabulary of {values['vocab_size']}")
    if not all(-1 <= i < values["num_target_layers"] for i in values["target_layer_ids"]):
        raise HeadError(
            f"{where}: target_layer_ids {values['target_layer_ids']} are not all layers of a target with {values['num_target_layers']}",
            "dspark and DeepSpec count the outputs of layers from 0, speculators and GGUF one higher: were these not converted?",
        )
    return HeadConfig(**values)


def refuse_other_formats(raw: dict, folder: Path) -> None:
    """Raise `HeadError` with the way out for folders of speculators and SpecForge."""
    name = "speculators" if "speculators_model_type" in raw else "SpecForge" if "dflash_config" in raw else None
    if name:
        raise HeadError(f"{folder} is a head in the format of {name}", f"convert it first: `dspark convert {folder} DIR --target TARGET`")


def refuse_other_networks(layers: dict, where: str) -> None:
    """Raise `HeadError` for draft layers that dspark does not compute, by the config of another project."""
    rope = layers.get("rope_parameters") or layers.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    other = [t for t in layers.get("layer_types") or [] if t != "full_attention"]
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


def refuse_senseless(values: dict, where: str) -> None:
    """Raise `HeadError` for a value of another type than `HeadConfig` says, or a size below 1 or absurdly large."""
    for field in fields(HeadConfig):
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


def load_head(folder: str | Path, target: Target, calibrated: bool = True, same_target: bool = True) -> Head:
    """Load a head for this target and prove that it is the head, and the target, it was trained as.

    `folder` may also be a hub id or the name of a shipped head. Raises `HeadError` where there is none, for
    missing, extra or misshaped tensors, another target, another vocabulary, golden vectors that do not come
    out again, or a calibration of another pair (which `calibrated=False` leaves unread). Taps the target's layers.
    `same_target=False` takes a target of other weights, to adapt the head to: of the golden vectors only what the head
    computes without the target's weights is then replayed, and there is no `self_test`."""
    folder = named_head(folder)
    config, section = read_config(folder)
    refuse_other_target(config, section, target)
    weights = read_weights(folder)
    refuse_broken(weights, f"{folder}/model.safetensors is damaged", "restore the file, or train the head again")
    for name in SHARED:
        weights.pop(name, None)
    draft_ids = weights.pop("draft_ids", torch.arange(config.draft_vocab_size)).long()
    if draft_ids.shape != (config.draft_vocab_size,) or not bool(((draft_ids >= 0) & (draft_ids < config.vocab_size)).all()):
        raise HeadError(
            f"{folder}/model.safetensors: draft_ids do not fit a draft vocabulary of {config.draft_vocab_size} out of {config.vocab_size}",
            "restore the file, or train the head again",
        )
    refuse_other_tensors(config, weights, f"{folder}/model.safetensors")
    head = empty_head(config, draft_ids, target)
    head.load_state_dict(weights)
    target.tap(config.target_layer_ids)
    golden = golden_file(folder)
    if section or golden.exists():  # heads of other projects come without
        head.self_test = replay_golden(head, target, read_tensors(golden), folder, same_target)
    head.calibration = calibration.read_calibration(folder, config.block_size) if calibrated else None
    if head.calibration is not None:
        calibration.refuse_other_pair(head.calibration, head, target, folder)
    head.to(device=target.device, dtype=target.model.dtype).eval()
    if target.runtime is not None:
        gather_weights(head)
    return head


def golden_file(folder: Path) -> Path:
    """Where the golden vectors of a head lie, or would."""
    carried = folder / CARRIED / "golden.safetensors"
    return carried if carried.exists() else folder / "golden.safetensors"


def empty_head(config: HeadConfig, draft_ids: torch.Tensor, target: Target) -> Head:
    """A head whose weights are NaN, so that one that is never loaded shouts."""
    rows = target.output_rows(draft_ids).cpu()
    mask = target.embed(torch.tensor(config.mask_token_id, device=target.device)).detach().float().cpu()
    with torch.device("meta"):  # no memory yet, so no time for random numbers that nobody reads
        head = Head(config, draft_ids, rows, mask)
    for module in head.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.full(parameter.shape, float("nan")), requires_grad=False)
    return head.eval()


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


def refuse_other_target(config: HeadConfig, section: dict, target: Target) -> None:
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


def refuse_other_tensors(config: HeadConfig, weights: dict[str, torch.Tensor], where: str) -> None:
    with torch.device("meta"):  # shapes alone: a damaged config may ask for more than there is memory
        head = Head(config, torch.empty(0), torch.empty(0), torch.empty(0))
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
    """The folder of a head given by path or hub id, or the one shipped for this target; None if there is none."""
    return shipped_head(target_name) if name is None else named_head(name)


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
