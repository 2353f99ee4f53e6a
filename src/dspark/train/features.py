"""Training samples: the target's features and its law over each answer token, computed once.

Features are computed by the same pass that serving uses and kept in memory-mapped files up to
a bound; what does not fit is computed again when it is needed. 38 TB are not required
(DeepSpec#21): five layers of SmolLM2-135M take 6 kB a token.

Shapes: S tokens of one sequence, n rows with a known next token, M tapped layers, D hidden, P teacher tokens."""

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dspark.errors import SettingError
from dspark.target.target import Target


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer. Row i of the teacher is the law of token `start + 1 + i`."""

    ids_S: torch.Tensor
    start: int  # the first anchor: the last prompt token
    features_SMD: torch.Tensor
    teacher_ids_nP: torch.Tensor
    teacher_probs_nP: torch.Tensor


class FeatureStore:
    """`store[i]` is the sample of record i; bounded by `gigabytes` of disk."""

    def __init__(self, target: Target, records: Sequence[dict], directory: Path, num_teacher: int, gigabytes: float):
        self.target, self.records, self.num_teacher = target, records, num_teacher
        M, D = len(target.layer_ids), target.hidden_size
        self.lengths = [len(r["prompt_ids"]) + len(r["answer_ids"]) - 1 for r in records]
        per_token = M * D * 2 + num_teacher * (4 + 2)
        self.offsets, used = [], 0
        for length in self.lengths:
            fits = (used + length) * per_token <= gigabytes * 1e9
            self.offsets.append(used if fits else None)
            used += length if fits else 0
        directory.mkdir(parents=True, exist_ok=True)
        rows = max(used, 1)
        files = {
            "features.bf16": ((rows, M, D), torch.bfloat16), "teacher_ids.i32": ((rows, num_teacher), torch.int32),
            "teacher_probs.f16": ((rows, num_teacher), torch.float16), "filled.u8": ((len(records),), torch.uint8),
        }  # fmt: skip
        sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in files.items()}
        self._forget_if_foreign(directory, sizes)
        self.features, self.teacher_ids, self.teacher_probs, self.filled = (
            mapped(directory / name, shape, dtype) for name, (shape, dtype) in files.items()
        )

    def _forget_if_foreign(self, directory: Path, sizes: dict[str, int]) -> None:
        """A cache of other records, layers or weights, or with a file that was cut, is deleted, not trusted."""
        described = json.dumps([
            self.target.layer_ids, self.num_teacher, self.target.fingerprint(),
            hashlib.sha256(json.dumps([(r["prompt_ids"], r["answer_ids"]) for r in self.records]).encode()).hexdigest(),
            hashlib.sha256(json.dumps(self.offsets).encode()).hexdigest(),
        ])  # fmt: skip
        label = directory / "cache.json"
        found = {file.name: file.stat().st_size for file in directory.glob("*.*")}
        if not sizes.items() <= found.items() or not label.exists() or label.read_bytes() != described.encode():
            for file in directory.glob("*.*"):
                file.unlink()
            label.write_text(described)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record, offset = self.records[index], self.offsets[index]
        ids = torch.tensor(record["prompt_ids"] + record["answer_ids"])
        start, S = len(record["prompt_ids"]) - 1, self.lengths[index]
        if offset is None:
            return Sample(ids, start, *self._compute(ids[:-1], S - start))
        rows = slice(offset, offset + S)
        answer_rows = slice(offset + start, offset + S)
        if not self.filled[index]:
            computed = self._compute(ids[:-1], S - start)
            self.features[rows], self.teacher_ids[answer_rows], self.teacher_probs[answer_rows] = computed
            self.filled[index] = 1
        return Sample(ids, start, self.features[rows], self.teacher_ids[answer_rows], self.teacher_probs[answer_rows])

    def _compute(self, ids: torch.Tensor, num_answer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scored = self.target.score(self.target.start(), ids.tolist(), num_logits=num_answer)
        top = scored.logits_TV.topk(self.num_teacher, dim=-1)
        probs = (top.values - scored.logits_TV.logsumexp(-1, keepdim=True)).exp()
        return scored.features_TMD.bfloat16(), top.indices.int(), probs.half()


def mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor backed by a file. Its blocks are reserved now: a full disk found later would end the process
    with a bus error. Raises `SettingError` when they are not to be had."""
    size = torch.Size(shape).numel()
    try:
        with path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SettingError(
                f"no space for the feature cache {path} ({size * dtype.itemsize / 1e9:.1f} GB)", "lower --cache-gb, or free some space"
            ) from error
        # other file systems cannot reserve; the tensor below then makes a sparse file
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
