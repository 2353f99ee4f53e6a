"""From any format to any other: read, compare with the target, write, read back, replay the golden vectors."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from dspark.errors import HeadError, SettingError
from dspark.formats import deepspec, eagle3, gguf_file, specforge, speculators
from dspark.formats.portable import Portable, refuse_other_rows
from dspark.head import calibration
from dspark.head.folder import (
    SHARED,
    empty_head,
    load_head,
    read_config,
    read_tensors,
    read_weights,
    refuse_other_target,
    refuse_other_tensors,
    save_head,
)
from dspark.head.golden import refuse_broken, replay_golden
from dspark.head.head import Head, SelfTest
from dspark.prompts import read_json, read_prompts
from dspark.target.target import Target

OWN, EAGLE3 = "dspark", "eagle3"  # the latter is only read
FORMATS = {"deepspec": deepspec, "speculators": speculators, "specforge": specforge, "gguf": gguf_file}
Say = Callable[[str], None]


def detect(path: Path) -> str:
    """The format of a file or folder. Raises `HeadError` when nothing tells."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                return "gguf"
        raise HeadError(f"{path} is no GGUF file", "give a GGUF file, or the folder of a head")
    if not (path / "config.json").exists():
        raise HeadError(f"no head at {path}: no file, and no folder with config.json", "give a GGUF file, or the folder of a head")
    raw = config_of(path)
    section = raw.get("dspark")
    if eagle3.is_eagle3(raw):
        return EAGLE3
    if "speculators_model_type" in raw:
        return "speculators"
    if "dflash_config" in raw:
        return "specforge"
    if isinstance(section, dict) and "exported_as" not in section:
        return OWN
    if "target_layer_ids" in raw and "block_size" in raw:
        return "deepspec"
    raise HeadError(f"{path}/config.json is of no known format", f"say which with --from: {', '.join([OWN, *FORMATS])}")


def named_target(path: Path, kind: str) -> str | None:
    """The target that a head says it was made for."""
    if kind == "gguf":
        return gguf_file.read_file(path)[0].get("dspark.target") or None
    raw = config_of(path)
    section, verifier = raw.get("dspark"), raw.get("speculators_config")
    if isinstance(section, dict) and section.get("target"):
        return str(section["target"])
    verifier = verifier.get("verifier") if isinstance(verifier, dict) else None
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    return name if isinstance(name, str) else None


def layers_read(path: Path, kind: str) -> tuple[list[int], int | None]:
    """The target's layers that a head reads, and how many the target has: what its own files say of them, in dspark's numbers. Empty, and
    None, where they say nothing that can be read. Raises `HeadError` for a head of dspark's own that is not converted."""
    taps: Any
    number: Any
    if kind == OWN:
        config, _ = read_config(path)
        taps, first, number = list(config.target_layer_ids), 0, config.num_target_layers
    elif kind == "gguf":
        keys, _ = gguf_file.read_file(path)
        taps, first, number = keys.get(f"{gguf_file.ARCH}.target_layers"), 1, keys.get("dspark.num_target_layers")
    elif kind == EAGLE3:
        taps, first, number = None, 0, None
    else:
        raw = config_of(path)
        inner = raw.get("dflash_config")
        name, first = ("aux_hidden_state_layer_ids", 1) if kind == "speculators" else ("target_layer_ids", 0)
        taps, number = (inner if isinstance(inner, dict) else raw).get(name), raw.get("num_target_layers")
    readable = isinstance(taps, list) and all(type(i) is int for i in taps)
    return [i - first for i in taps] if readable else [], number if type(number) is int else None


def config_of(path: Path) -> dict:
    raw = read_json(path / "config.json", HeadError, "restore the file")
    if not isinstance(raw, dict):
        raise HeadError(f"{path}/config.json is damaged: an object was expected", "restore the file")
    return raw


def refuse_existing(path: Path) -> None:
    """Raise `HeadError` where something is already."""
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise HeadError(f"{path} exists already", "choose another place, or delete it")


def refuse_only_read(kind: str, to: str, taps: Sequence[int] | None) -> None:
    """Raise `SettingError` where an EAGLE-3 head would become anything but dspark's own."""
    if kind == EAGLE3 and (to != OWN or taps is not None):
        raise SettingError("an EAGLE-3 head is only read, as it is", "convert it --to dspark, without --taps")


def convert(
    source: Path, kind: str, to: str, path: Path, target: Target, command: str, say: Say, taps: tuple[int, ...] | None = None
) -> SelfTest | None:
    """Write the head in `source`, of format `kind`, to `path` in the format `to`; says what its draft is worth on this target.
    With `taps` it reads these layers from then on in the place of its own, one for each: its tensors stay.

    Raises `HeadError` for what a format cannot hold, for a head of another target, for files that are not whole or
    follow another convention, and for golden vectors that do not come out again."""
    refuse_existing(path)
    refuse_only_read(kind, to, taps)
    if kind == EAGLE3:
        layers, named = eagle3.bring_in(source, path, target, golden_ids(target), command)
        whose = "named by the head" if named else "the usual ones: the head names none"
        say(f"it reads the target's layers {', '.join(map(str, layers))} ({whose})")
        return load_head(path, target).self_test
    head = read_own(source) if kind == OWN else FORMATS[kind].read(source, target)
    refuse_other_target(head.config, head.section, target)
    refuse_broken(head.weights, f"{head.where} is damaged", "restore the file")
    refuse_other_tensors(head.config, head.weights, head.where)
    if head.section.get("tensors_sha256") not in (None, head.digest()):
        raise HeadError(f"{head.where}: its tensors are not those that `dspark convert` wrote", "restore the file")
    refuse_other_rows(head, target)
    network = build(head, target)
    test = replay_kept(head, network, target)
    if taps is not None and taps != head.config.target_layer_ids:
        head = retapped(head, taps, target)
        say("golden vectors, calibration and card are of the head with its own layers: they stay behind")
        network, test = build(head, target), None
    if to == OWN:
        import_head(head, network, path, target, kind, command)
        if head.kept is None:
            say("it brought no golden vectors and no calibration: the vectors are new, `dspark calibrate` measures the other")
        return load_head(path, target).self_test
    FORMATS[to].write(head, path, target, card(head, target, to))
    back = FORMATS[to].read(path, target)
    refuse_unequal(head, back, to)  # then the golden vectors, replayed above, hold for it too
    if to == "gguf" and (word := gguf_file.note(head)):
        say(word)
    return test


def retapped(head: Portable, taps: tuple[int, ...], target: Target) -> Portable:
    """The same tensors behind other layers. Golden vectors, calibration and card were of the head as it was, and stay behind."""
    refuse_taps(taps, head.config.target_layer_ids, target.num_layers)
    return replace(head, config=replace(head.config, target_layer_ids=taps), section={}, kept=None)


def refuse_taps(taps: Sequence[int], own: Sequence[int], num_layers: int | None) -> None:
    """Raise `SettingError` unless `taps` can stand in the place of a head's `own`, of a target of so many layers. What is not known (empty,
    or None) refuses nothing."""
    count = f"{len(own)} layers" if own else "layers"
    too_high = num_layers is not None and taps[-1] >= num_layers
    if (own and len(taps) != len(own)) or list(taps) != sorted(set(taps)) or taps[0] < 0 or too_high:
        of, to = ("", "") if num_layers is None else (f" of {num_layers}", f" to {num_layers - 1}")
        raise SettingError(
            f"--taps is {','.join(map(str, taps))}; the head reads {count}{of}, in ascending order",
            f"give {count} in ascending order, from 0{to}" + (f"; it reads {','.join(map(str, own))} now" if own else ""),
        )


def read_own(path: Path) -> Portable:
    config, section = read_config(path)
    tensors = read_weights(path)
    draft_ids = tensors.pop("draft_ids", torch.arange(config.draft_vocab_size)).long()
    for name in SHARED:
        tensors.pop(name, None)
    return Portable(config, tensors, draft_ids, str(path), section=section, kept=path)


def build(head: Portable, target: Target) -> Head:
    network = empty_head(head.config, head.draft_ids, target)
    network.load_state_dict({name: tensor.float() for name, tensor in head.weights.items()})
    return network


def replay_kept(head: Portable, network: Head, target: Target) -> SelfTest | None:
    golden = kept_golden(head)
    return replay_golden(network, target, golden, Path(head.where)) if golden else None


def kept_golden(head: Portable) -> dict[str, torch.Tensor] | None:
    file = None if head.kept is None else head.kept / "golden.safetensors"
    return read_tensors(file) if file is not None and file.exists() else None


def refuse_unequal(head: Portable, back: Portable, to: str) -> None:
    """Raise `HeadError` unless what was written reads back bit for bit."""
    same = head.weights.keys() == back.weights.keys() and all(
        t.dtype == back.weights[name].dtype and torch.equal(t, back.weights[name]) for name, t in head.weights.items()
    )
    config = head.config
    if config.markov_rank == 0:  # then these say nothing, and formats disagree on what to write
        config = replace(config, markov_head_type="vanilla", confidence_head_with_markov=back.config.confidence_head_with_markov)
    if to == "gguf":  # float32 there
        config = replace(config, rms_norm_eps=back.config.rms_norm_eps, rope_theta=back.config.rope_theta)
    if not same or config != back.config or not torch.equal(head.draft_ids, back.draft_ids):
        raise HeadError(f"{back.where} does not read back as {head.where}: {to} lost some of it", "please report this head's config.json")


def import_head(head: Portable, network: Head, path: Path, target: Target, kind: str, command: str) -> None:
    """A folder of dspark's own, with the golden vectors, calibration and card that travelled along, or new ones."""
    kept, golden = head.kept, kept_golden(head)
    provenance = {"command": command, "converted_from": kind, "sha256": head.digest(), "python": platform.python_version()}
    if kept is not None and (kept / "provenance.json").exists():
        provenance = read_json(kept / "provenance.json", HeadError, "delete it") | {"converted": provenance}
    if kept is not None:
        network.calibration = calibration.read_calibration(kept, head.config.block_size)
    ids = [] if golden else golden_ids(target)
    precisions = {name: tensor.dtype for name, tensor in head.weights.items()}
    save_head(network, target, path, ids, provenance, card(head, target, OWN), precisions, golden)


def golden_ids(target: Target) -> list[int]:
    """A text to make golden vectors on begins with these."""
    prompt = read_prompts(str(files("dspark") / "demo_prompts.jsonl"))[0].content
    return list(range(1, 17)) if target.tokenizer is None else target.prompt_ids(prompt)


def card(head: Portable, target: Target, to: str) -> str:
    """README.md of a converted head; the original's where it came with one."""
    original = Path(head.where) / "README.md"
    if head.kept is not None and original.exists():
        return original.read_text(encoding="utf-8")
    config = head.config
    return f"""---
base_model: {target.name}
tags: [speculative-decoding, dspark]
---
# Draft head for {target.name}

{config.num_hidden_layers} layers, block of {config.block_size}, {config.draft_vocab_size} of {config.vocab_size} tokens, taps after layers
{", ".join(map(str, config.target_layer_ids))}. Converted by `dspark convert --to {to}`.
"""
