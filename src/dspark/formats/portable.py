"""A head between two formats: its shape, its tensors bit for bit in DeepSpec's names, and what belongs to the target.

Shapes: V vocabulary, Vd draft vocabulary, D hidden."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dspark.config import HeadConfig
from dspark.errors import HeadError
from dspark.head.calibration import NAME as CALIBRATION
from dspark.head.folder import CARRIED, SHARED
from dspark.target.quantize import rows_of
from dspark.target.target import Target

KEPT = ("golden.safetensors", "provenance.json", CALIBRATION)  # what only dspark reads, in a folder of its own


@dataclass
class Portable:
    config: HeadConfig
    weights: dict[str, torch.Tensor]  # in their file's precision
    draft_ids: torch.Tensor  # [Vd] int64, ascending
    where: str  # the file they come from, for messages
    rows: dict[str, torch.Tensor] = field(default_factory=dict)  # copies of the target's, by their names in SHARED
    section: dict = field(default_factory=dict)  # what dspark wrote of itself
    kept: Path | None = None  # the folder with some of KEPT

    @property
    def reduced(self) -> bool:
        return self.config.draft_vocab_size < self.config.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["fc.weight"].dtype

    def digest(self) -> str:
        """A hash of all tensors, in the order of their names."""
        total = hashlib.sha256()
        for name in sorted(self.weights):
            total.update(name.encode() + self.weights[name].contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


def embedding_scale(target: Target) -> float:
    """What the target multiplies its embeddings by (Gemma); 1 for most."""
    raw = rows_of(target.model.get_input_embeddings().weight, torch.tensor([1, 2], device=target.device))
    seen = target.embed(torch.tensor([1, 2], device=target.device)).detach().float()
    return round((seen * raw).sum().item() / (raw * raw).sum().item(), 2)


def embedding_rows(target: Target) -> torch.Tensor:
    """[V, D] in float32, scaled as the target scales them."""
    with torch.no_grad():
        return target.embed(torch.arange(target.vocab_size, device=target.device)).float().cpu()


def refuse_other_rows(head: Portable, target: Target) -> None:
    """Raise `HeadError` where the file's rows are not the target's, which dspark would use instead."""
    for name in SHARED:
        if name not in head.rows:
            continue
        wanted = embedding_rows(target) if name == SHARED[0] else target.output_rows(head.draft_ids).cpu()
        refuse_unlike(name, head.rows[name].float(), wanted, head.where)


def refuse_unlike(name: str, found: torch.Tensor, wanted: torch.Tensor, where: str) -> None:
    """Raise `HeadError` where rows that a head brings are not the target's."""
    if found.shape != wanted.shape:
        raise HeadError(f"{where}: {name} has shape {tuple(found.shape)} instead of {tuple(wanted.shape)}")
    error = ((found - wanted).norm() / wanted.norm()).item()
    if not error < 0.05:  # 4-bit rounding of the target comes to less
        raise HeadError(
            f"{where}: {name} differs from the target's own rows by {error:.0%}, and dspark drafts with the target's",
            "was the head made for another target? a head with rows of its own cannot be run",
        )


def draft_ids_of_offsets(tensors: dict[str, torch.Tensor], vocab: int, draft_vocab: int, where: str) -> torch.Tensor:
    """Take t2d [V] and d2t [Vd] out of the tensors: the target id of draft id i is i + d2t[i]. Raises `HeadError`."""
    t2d, d2t = tensors.pop("t2d", None), tensors.pop("d2t", None)
    if draft_vocab == vocab and d2t is None:
        return torch.arange(vocab)
    if t2d is None or d2t is None:
        lacks = " and ".join(name for name, tensor in (("t2d", t2d), ("d2t", d2t)) if tensor is None)
        raise HeadError(f"{where} lacks {lacks}: a draft vocabulary of {draft_vocab} out of {vocab} needs both", "restore the file")
    if t2d.shape != (vocab,) or d2t.shape != (draft_vocab,):
        raise HeadError(f"{where}: t2d {tuple(t2d.shape)} and d2t {tuple(d2t.shape)} do not fit {draft_vocab} of {vocab} tokens")
    kept, ids = t2d.bool().nonzero().flatten(), torch.arange(draft_vocab) + d2t.long()
    if torch.equal(kept, ids):
        return ids
    if torch.equal(kept, d2t.long()):
        raise HeadError(f"{where}: d2t holds target ids, this format has offsets (id minus position)", "subtract 0, 1, 2, ... from it")
    raise HeadError(f"{where}: t2d and d2t name different tokens", "the mapping is damaged, or of another head: restore it")


def offsets(head: Portable) -> dict[str, torch.Tensor]:
    """t2d and d2t of a reduced draft vocabulary; nothing for a whole one."""
    if not head.reduced:
        return {}
    t2d = torch.zeros(head.config.vocab_size, dtype=torch.bool)
    t2d[head.draft_ids] = True
    return {"t2d": t2d, "d2t": head.draft_ids - torch.arange(len(head.draft_ids))}


def take_rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensors.pop(name) for name in SHARED if name in tensors}


def kept_in(folder: Path) -> Path | None:
    carried = folder / CARRIED
    return carried if carried.is_dir() else None


def write_folder(head: Portable, path: Path, config: dict, tensors: dict[str, torch.Tensor], card: str) -> None:
    """A folder as Hugging Face loaders know it. Raises `HeadError` when the disk is full or closed to us."""

    def fill(folder: Path) -> None:
        folder.mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets only its writer read
        (folder / "README.md").write_text(card, encoding="utf-8")
        for name in KEPT:
            if head.kept is not None and (head.kept / name).exists():
                (folder / CARRIED).mkdir(exist_ok=True)
                shutil.copyfile(head.kept / name, folder / CARRIED / name)

    write_whole(path, fill)


def write_whole(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write beside the place of `path` and rename it when it is whole. Raises `HeadError` when it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            fill(Path(scratch) / path.name)
            os.replace(Path(scratch) / path.name, path)
    except (OSError, SafetensorError) as error:
        raise HeadError(f"cannot write {path}: {error}", "free some space or choose another place") from error
