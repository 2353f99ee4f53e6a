"""A head on disk: DeepSpec's names and layout, plus what makes it describe itself.

    config.json          the target's own config with DeepSpec's keys, and a `dspark` section
    model.safetensors    bfloat16; without the target's embedding and output rows, which are the target's own
    golden.safetensors   token ids, features, draft logits: replayed at every load
    provenance.json      command, versions, data, time, measured figures
    README.md            the card
    calibration.json     temperatures of the confidences, once fitted

Files are written beside their places and renamed when all are whole: a full disk or a kill
never leaves half a head where a good one was."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dspark.config import MAX_BLOCK, SEQUENTIAL_HEADS, HeadConfig
from dspark.errors import HeadError
from dspark.head import calibration
from dspark.head.head import Head
from dspark.prompts import read_json
from dspark.target import demo, hub
from dspark.target.quantize import is_int8
from dspark.target.target import Target

OWN_KEYS = [f.name for f in fields(HeadConfig)]
IN_SECTION = ("draft_vocab_size", "shortlist")  # DeepSpec has no such keys
# The calibration comes last: not every head has one, so no failure can leave a new one with an old head.
FILES = ("model.safetensors", "golden.safetensors", "config.json", "provenance.json", "README.md", calibration.NAME)
# Sizes beyond these come from a damaged file; their products still are numbers that torch can hold.
MOST = {"block_size": MAX_BLOCK, "num_hidden_layers": 256}
MOST_OF_A_SIZE = 2**20
SHARED = ("embed_tokens.weight", "lm_head.weight")  # DeepSpec saves copies of the target's; we need none
GOLDEN_TOKENS = 48
WHAT_A_HEAD_IS = "give a folder with config.json and model.safetensors, as `dspark train TARGET --out DIR` writes it, or a hub id"
# Features of the target at hand against those stored: mean cosine over tokens, of the worst layer.
SAME_TARGET, CLOSE_TARGET = 0.8, 0.97


def vocabulary_hash(target: Target) -> str | None:
    if target.tokenizer is None:
        return None
    vocabulary = sorted(target.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def config_json(head: Head, target: Target) -> dict:
    """DeepSpec's config.json: the target's own, then the head's keys over it."""
    config = target.text_config.to_dict()
    for key in ("quantization_config", "_name_or_path"):  # neither describes the head; the second is a path of this machine
        config.pop(key, None)
    own = {key: getattr(head.config, key) for key in OWN_KEYS if key not in IN_SECTION}
    config |= own | {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "target_layer_ids": list(head.config.target_layer_ids),
        "layer_types": ["full_attention"] * head.config.num_hidden_layers,
        "tie_word_embeddings": False,
        "num_anchors": 512,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": head.config.rope_theta},
        "dspark": {
            "format": 1,
            "target": target.name,
            "target_model_type": target.text_config.model_type,
            "vocabulary_sha256": vocabulary_hash(target),
            "shared_with_target": list(SHARED),
            **{key: getattr(head.config, key) for key in IN_SECTION},
        },
    }
    return config


def save_head(head: Head, target: Target, folder: Path, golden_ids: list[int], provenance: dict, card: str) -> None:
    """Write a head that `load_head` accepts. Raises `HeadError` when the disk is full or closed to us."""
    weights = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in head.state_dict().items()}
    if head.config.draft_vocab_size < head.config.vocab_size:
        weights["draft_ids"] = head.draft_ids.int()
    refuse_broken(weights, "nothing was saved", "lower the learning rate")
    # Golden logits come from the rounded weights, which are what a reader will have.
    rounded = empty_head(head.config, head.draft_ids, target)
    rounded.load_state_dict({k: v.float() for k, v in weights.items() if k != "draft_ids"})
    golden = make_golden(rounded, target, golden_ids)
    if not 0 < golden["logits"].float().std() < float("inf"):
        raise HeadError(
            "nothing was saved: the head's logits are all alike, or not numbers; its training diverged", "lower the learning rate"
        )
    texts = {
        "config.json": json.dumps(config_json(head, target), indent=2, default=str) + "\n",
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
    values = {key: raw.get(key) for key in OWN_KEYS if key not in IN_SECTION}
    values["rope_theta"] = values["rope_theta"] or rope.get("rope_theta")
    values["draft_vocab_size"] = section.get("draft_vocab_size", raw.get("vocab_size"))
    values["shortlist"] = section.get("shortlist", 0)
    if values["markov_rank"] == 0:
        values["markov_head_type"] = values["markov_head_type"] or "vanilla"
    missing = [key for key, value in values.items() if value is None]
    if missing:
        raise HeadError(f"{folder}/config.json lacks {', '.join(missing)}", "is this a DSpark head?")
    if values["markov_head_type"] not in SEQUENTIAL_HEADS:
        raise HeadError(f"unknown markov_head_type {values['markov_head_type']!r}; known: {', '.join(SEQUENTIAL_HEADS)}")
    if not isinstance(values["target_layer_ids"], list):
        raise HeadError(f"{folder}/config.json: target_layer_ids is {values['target_layer_ids']!r}, a list was expected")
    values["target_layer_ids"] = tuple(values["target_layer_ids"])
    refuse_senseless(values, folder)
    if not 0 <= values["mask_token_id"] < values["vocab_size"]:
        raise HeadError(
            f"{folder}/config.json: mask_token_id {values['mask_token_id']} is outside the vocabulary of {values['vocab_size']}"
        )
    if not all(-1 <= i < values["num_target_layers"] for i in values["target_layer_ids"]):
        raise HeadError(
            f"{folder}/config.json: target_layer_ids {values['target_layer_ids']} are not all layers of a target with {values['num_target_layers']}"
        )
    return HeadConfig(**values), section


def refuse_senseless(values: dict, folder: Path) -> None:
    """Raise `HeadError` for a value of another type than `HeadConfig` says, or a size below 1 or absurdly large."""
    for field in fields(HeadConfig):
        value = values[field.name] if field.name != "target_layer_ids" else None
        if field.type is bool:
            sound = isinstance(value, bool)
        elif field.type in (int, float):
            lowest = 0 if field.name in ("markov_rank", "mask_token_id", "shortlist") else 1 if field.type is int else 1e-30
            most = 2**31 if field.type is float else MOST.get(field.name, MOST_OF_A_SIZE)
            sound = isinstance(value, (int, field.type)) and not isinstance(value, bool) and lowest <= value <= most
        else:
            sound = True
        if not sound:
            raise HeadError(f"{folder}/config.json: {field.name} is {value!r}", "restore the file, or train the head again")
    layers = values["target_layer_ids"]
    if not layers or not all(type(i) is int for i in layers) or list(layers) != sorted(set(layers)):
        raise HeadError(f"{folder}/config.json: target_layer_ids {list(layers)} are not ascending layer numbers")
    if values["num_attention_heads"] % values["num_key_value_heads"]:
        raise HeadError(
            f"{folder}/config.json: {values['num_key_value_heads']} key heads do not divide {values['num_attention_heads']} heads"
        )
    if values["draft_vocab_size"] > values["vocab_size"]:
        raise HeadError(
            f"{folder}/config.json: draft_vocab_size {values['draft_vocab_size']} exceeds the vocabulary of {values['vocab_size']}"
        )


def load_head(folder: str | Path, target: Target, calibrated: bool = True, same_target: bool = True) -> Head:
    """Load a head for this target and prove that it is the head, and the target, it was trained as.

    `folder` may also be a hub id or the name of a shipped head. Raises `HeadError` where there is none, for
    missing, extra or misshaped tensors, another target, another vocabulary, golden vectors that do not come
    out again, or a calibration of another pair (which `calibrated=False` leaves unread). Taps the target's layers.
    `same_target=False` takes a target of other weights, to adapt the head to: its golden vectors are then not replayed."""
    folder = named_head(folder)
    config, section = read_config(folder)
    refuse_other_target(config, section, target)
    weights = read_tensors(folder / "model.safetensors")
    refuse_broken(weights, f"{folder}/model.safetensors is damaged", "restore the file, or train the head again")
    for name in SHARED:
        weights.pop(name, None)
    draft_ids = weights.pop("draft_ids", torch.arange(config.draft_vocab_size)).long()
    if draft_ids.shape != (config.draft_vocab_size,) or not bool(((draft_ids >= 0) & (draft_ids < config.vocab_size)).all()):
        raise HeadError(
            f"{folder}/model.safetensors: draft_ids do not fit a draft vocabulary of {config.draft_vocab_size} out of {config.vocab_size}",
            "restore the file, or train the head again",
        )
    refuse_other_tensors(config, weights, folder)
    head = empty_head(config, draft_ids, target)
    head.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    target.tap(config.target_layer_ids)
    if section or (folder / "golden.safetensors").exists():  # heads of other projects come without
        golden = read_tensors(folder / "golden.safetensors")
        refuse_unfit_golden(golden, head, target, folder)
        if same_target:
            replay_golden(head, target, golden, folder)
    head.calibration = calibration.read_calibration(folder, config.block_size) if calibrated else None
    if head.calibration is not None:
        calibration.refuse_other_pair(head.calibration, head, target, folder)
    return head.to(device=target.device, dtype=target.model.dtype).eval()


def empty_head(config: HeadConfig, draft_ids: torch.Tensor, target: Target) -> Head:
    """A head whose weights are NaN, so that one that is never loaded shouts."""
    rows = target.output_rows(draft_ids).cpu()
    mask = target.embed(torch.tensor(config.mask_token_id, device=target.device)).detach().float().cpu()
    head = Head(config, draft_ids, rows, mask)
    for parameter in head.parameters():
        parameter.data.fill_(float("nan"))
        parameter.requires_grad_(False)
    return head.eval()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise HeadError(f"cannot read {path}: {error}", "restore the file, or train the head again") from error


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


def refuse_broken(tensors: dict[str, torch.Tensor], where: str, hint: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise HeadError(f"{where}: NaN or infinity in {name}", hint)


def refuse_other_tensors(config: HeadConfig, weights: dict[str, torch.Tensor], folder: Path) -> None:
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
            f"{folder}/model.safetensors does not fit its config: {'; '.join(sorted(problems)[:4])}{more}",
            "restore the file, or train the head again",
        )


def make_golden(head: Head, target: Target, ids: list[int]) -> dict[str, torch.Tensor]:
    """What must come out again: features of the target, and base logits of the block after the last token."""
    ids = ids[:GOLDEN_TOKENS]
    target.tap(head.config.target_layer_ids)
    features = target.score(target.start(), ids).features_TMD.to(torch.bfloat16)
    return {
        "ids": torch.tensor(ids, dtype=torch.int32),
        "layer_ids": torch.tensor(head.config.target_layer_ids, dtype=torch.int32),
        "features": features.cpu(),
        "logits": golden_logits(head, target, ids, features.cpu()).half(),
    }


@torch.no_grad()
def golden_logits(head: Head, target: Target, ids: list[int], features: torch.Tensor) -> torch.Tensor:
    context_kv = head.context_kv(features[None, :-1].float(), torch.arange(len(ids) - 1)[None])
    anchor = target.embed(torch.tensor([[ids[-1]]], device=target.device)).float().cpu()
    return head.base_logits(head.hidden(anchor, torch.tensor([[len(ids) - 1]]), context_kv))[0, 0]


def refuse_unfit_golden(golden: dict[str, torch.Tensor], head: Head, target: Target, folder: Path) -> None:
    """Raise `HeadError` for golden vectors that are not whole, or are not of a head of this shape."""
    missing = {"ids", "layer_ids", "features", "logits"} - golden.keys()
    if missing:
        raise HeadError(f"{folder}/golden.safetensors lacks {', '.join(sorted(missing))}", "restore the file, or train the head again")
    if tuple(golden["layer_ids"].flatten().tolist()) != head.config.target_layer_ids:
        raise HeadError(
            f"{folder} was trained on layers {golden['layer_ids'].tolist()}, its config names {list(head.config.target_layer_ids)}",
            "restore config.json",
        )
    refuse_misshapen_golden(golden, head, target, folder)


def replay_golden(head: Head, target: Target, golden: dict[str, torch.Tensor], folder: Path) -> None:
    """Raise `HeadError` unless head and target still compute what they did after training."""
    import warnings

    ids, stored = golden["ids"].tolist(), golden["logits"].float()
    logits = golden_logits(head, target, ids, golden["features"])
    # fp16 storage of the logits rounds at 5e-4 relative, 8-bit output rows at 1e-2; a wrong weight or tap moves
    # the logits by their spread.
    error = ((logits - stored).abs().max() / stored.std()).item()
    if not error < (0.25 if is_int8(target.model.get_output_embeddings().weight) else 0.05):
        raise HeadError(
            f"golden vectors of {folder} do not come out again (logits off by {error:.2f} of their spread)",
            "the head's files do not belong together: restore them",
        )
    likeness = features_likeness(target, golden)
    name = target.name or type(target.model).__name__
    if not likeness > SAME_TARGET:
        raise HeadError(
            f"head was trained on another target than {name}: its features agree to {likeness:.2f} only",
            f"train one for this target: `dspark train {target.name or 'TARGET'} --out DIR`",
        )
    if likeness < CLOSE_TARGET:
        warnings.warn(
            f"{name} differs from the target this head was trained on (features agree to {likeness:.2f}); expect fewer accepted tokens",
            stacklevel=3,
        )


def features_likeness(target: Target, golden: dict[str, torch.Tensor]) -> float:
    """Mean cosine over tokens of the target's features and the stored ones, of the worst layer. The layers must be tapped."""
    found = target.score(target.start(), golden["ids"].tolist()).features_TMD.float().cpu()
    return torch.cosine_similarity(found, golden["features"].float(), dim=-1).mean(0).min().item()


def refuse_misshapen_golden(golden: dict[str, torch.Tensor], head: Head, target: Target, folder: Path) -> None:
    config, ids = head.config, golden["ids"]
    num_ids, whole = ids.numel(), (torch.int32, torch.int64)
    wanted = {
        "ids": (num_ids,),
        "features": (num_ids, len(config.target_layer_ids), config.hidden_size),
        "logits": (config.block_size, config.draft_vocab_size),
    }
    problems = [f"{name} has shape {tuple(golden[name].shape)}" for name, shape in wanted.items() if golden[name].shape != shape]
    problems += [f"{name} are not floats" for name in ("features", "logits") if not golden[name].is_floating_point()]
    if ids.dtype not in whole or not 1 <= num_ids <= target.max_context or not bool(((ids >= 0) & (ids < config.vocab_size)).all()):
        problems.append("ids are no tokens of this target")
    hint = "restore the file, or train the head again"
    if problems:
        raise HeadError(f"{folder}/golden.safetensors is damaged: {'; '.join(problems)}", hint)
    refuse_broken(golden, f"{folder}/golden.safetensors is damaged", hint)


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
        raise HeadError(f"{name} is a file", WHAT_A_HEAD_IS)
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
