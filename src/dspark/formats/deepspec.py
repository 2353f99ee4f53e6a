"""DeepSpec's folder: dspark's own names and config, with copies of the target's rows. Whole vocabulary only."""

from pathlib import Path

import torch

from dspark.errors import HeadError
from dspark.formats.portable import Portable, embedding_rows, kept_in, take_rows, write_folder
from dspark.head.folder import SHARED, config_json, read_config, read_weights
from dspark.prompts import read_json
from dspark.target.target import Target

ARCHITECTURES = ("Qwen3DSparkModel",)


def read(path: Path, target: Target) -> Portable:
    """Raises `HeadError` for other architectures and damaged configs."""
    config, section = read_config(path)
    raw = read_json(path / "config.json", HeadError, "restore the file")
    known = [name for name in raw.get("architectures") or [] if name in ARCHITECTURES]
    if not known:
        raise HeadError(f"{path}/config.json: architectures {raw.get('architectures')}; dspark runs {' and '.join(ARCHITECTURES)}")
    tensors = read_weights(path)
    rows = take_rows(tensors)
    return Portable(config, tensors, torch.arange(config.vocab_size), str(path), rows, section, kept_in(path))


def write(head: Portable, path: Path, target: Target, card: str) -> None:
    """Raises `HeadError` for a reduced draft vocabulary."""
    if head.reduced:
        raise HeadError(
            f"DeepSpec's format has no reduced draft vocabulary, and this head drafts {head.config.draft_vocab_size} of "
            f"{head.config.vocab_size} tokens",
            "speculators and gguf hold it; `dspark train --draft-vocab` sets it",
        )
    config = config_json(head.config, target) | {"dtype": str(head.dtype).removeprefix("torch.")}
    config["dspark"] |= {"exported_as": "deepspec", "shared_with_target": []}
    rows = (embedding_rows(target), target.output_rows(head.draft_ids).cpu())
    shared = {name: tensor.to(head.dtype) for name, tensor in zip(SHARED, rows, strict=True)}
    write_folder(head, path, config, shared | head.weights, card)
