"""Training samples: the target's features and its law over each answer token, computed once.

Features are computed by the same pass that serving uses and kept in memory-mapped files up to
a bound; what does not fit is computed again when it is needed. 38 TB are not required
(DeepSpec#21): five layers of SmolLM2-135M take 6 kB a token, half of it in float8. The processes of one machine map the same files. With the target on a GPU they stay in its memory
if they fit, and are computed many sequences at once.

Shapes: B sequences of one pass, S tokens of one sequence, R rows of the store, n rows with a known next token, M tapped layers,
D hidden, P teacher tokens."""

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dspark.errors import LogitsError, SettingError
from dspark.target.target import Target

GPU_SHARE = 0.8  # of the GPU's free memory that samples may take; the rest is for the steps
PASS_TOKENS = 2**15  # of one pass over many sequences
PASS_BYTES = 4e9  # of its logits, in the target's precision
TEACHER_ROWS = 4096  # whose laws are formed at once
SUFFIX = {
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8",
    torch.float32: "f32",
    torch.int32: "i32",
    torch.float16: "f16",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer. Row i of the teacher is the law of token `start + 1 + i`."""

    ids_S: torch.Tensor
    start: int  # the first anchor: the last prompt token
    features_SMD: torch.Tensor
    teacher_ids_nP: torch.Tensor
    teacher_probs_nP: torch.Tensor


class FeatureStore:
    """`store[i]` is the sample of record i; bounded by `gigabytes` of disk, or `resident` in the GPU's memory."""

    def __init__(
        self, target: Target, records: Sequence[dict], directory: Path, num_teacher: int, gigabytes: float, dtype: str = "bfloat16"
    ):
        self.target, self.records, self.num_teacher = target, records, num_teacher
        M, D = len(target.layer_ids), target.hidden_size
        self.lengths = [len(r["prompt_ids"]) + len(r["answer_ids"]) - 1 for r in records]
        self.small = dtype == "float8"
        per_token = token_bytes(M, D, num_teacher, dtype)
        self.offsets: list[int | None] = []  # a record's first row in the cache; None where it has none
        self.resident = fits_gpu(target.device, sum(self.lengths) * per_token)
        if self.resident:
            self._make_resident(M, D)
            return
        used, bound = 0, gigabytes * 1e9 - len(records) - len(self._label())
        for length in self.lengths:
            fits = (used + length) * per_token <= bound
            self.offsets.append(used if fits else None)
            used += length if fits else 0
        files = {
            "features": ((used, M, D), torch.float8_e4m3fn if self.small else torch.bfloat16),
            "scales": ((used if self.small else 0, M), torch.float32),
            "teacher_ids": ((used, num_teacher), torch.int32),
            "teacher_probs": ((used, num_teacher), torch.float16),
            "filled": ((len(records) if used else 0,), torch.uint8),
        }  # fmt: skip
        shapes = {f"{name}.{SUFFIX[dtype]}": (torch.Size(shape), dtype) for name, (shape, dtype) in files.items()}
        self._forget_if_foreign(directory, {name: shape.numel() * dtype.itemsize for name, (shape, dtype) in shapes.items()})
        self.features, self.scales, self.teacher_ids, self.teacher_probs, self.filled = (
            mapped(directory / name, shape, dtype) if shape.numel() else torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in shapes.items()
        )

    def _make_resident(self, M: int, D: int) -> None:
        """Tensors on the target's device instead of files, and what a batch needs to find its rows there."""
        device, rows = self.target.device, sum(self.lengths)
        self.first_rows = [0, *itertools.accumulate(self.lengths)]
        self.offsets = list(self.first_rows[:-1])
        self.features = torch.empty(rows, M, D, dtype=torch.float8_e4m3fn if self.small else torch.bfloat16, device=device)
        self.scales = torch.empty(rows if self.small else 0, M, device=device)
        self.teacher_ids = torch.zeros(rows, self.num_teacher, dtype=torch.int32, device=device)
        self.teacher_probs = torch.zeros(rows, self.num_teacher, dtype=torch.float16, device=device)
        self.filled = torch.zeros(len(self.records), dtype=torch.uint8)
        # A record's last token has no row, so the ids need a table of their own.
        self.ids = torch.tensor([t for r in self.records for t in (*r["prompt_ids"], *r["answer_ids"])], dtype=torch.int32, device=device)

    def fill(self, indices: Sequence[int]) -> None:
        """Compute what is missing of these records in few large passes; for a resident store."""
        missing = sorted((i for i in set(indices) if not self.filled[i]), key=lambda i: self.lengths[i])
        vocabulary_bytes = self.target.vocab_size * self.target.model.dtype.itemsize
        most = max(1, min(PASS_TOKENS, int(PASS_BYTES / vocabulary_bytes)))
        while missing:
            group = missing[: max(1, most // self.lengths[missing[0]])]
            while len(group) * self.lengths[group[-1]] > max(most, self.lengths[group[0]]):
                group.pop()
            self._fill(group)
            self.filled[group] = 1
            missing = missing[len(group) :]

    @torch.inference_mode()
    def _fill(self, group: Sequence[int]) -> None:
        """One pass over these records, padded at the end: causal rows do not see what follows them."""
        device, longest = self.target.device, max(self.lengths[i] for i in group)
        starts = [len(self.records[i]["prompt_ids"]) - 1 for i in group]
        tokens = [[*self.records[i]["prompt_ids"], *self.records[i]["answer_ids"]][: self.lengths[i]] for i in group]
        ids_BS = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], device=device)
        keep = self.target.logits_to_keep(longest, longest - min(starts))
        with self.target.forgets.as_decoded():
            output = self.target.model(input_ids=ids_BS, use_cache=False, logits_to_keep=keep)
        offsets, lengths, first = (
            torch.tensor(values, device=device)[:, None]
            for values in ([self.first_rows[i] for i in group], [self.lengths[i] for i in group], starts)
        )
        column = torch.arange(longest, device=device)
        rows_BS = offsets + column
        real_BS = column < lengths
        self.keep(rows_BS[real_BS], self.target.captured()[real_BS].bfloat16())
        answers_BS = (real_BS & (column >= first))[:, min(starts) :]
        rows_R = rows_BS[:, min(starts) :][answers_BS]
        logits_RV = output.logits[answers_BS]
        for rows, logits in zip(rows_R.split(TEACHER_ROWS), logits_RV.split(TEACHER_ROWS), strict=True):
            self.teacher_ids[rows], self.teacher_probs[rows] = teacher(logits.float(), self.num_teacher)
        if bool(torch.isnan(self.teacher_probs[rows_R]).any()):
            raise LogitsError(f"{self.target.name or type(self.target.model).__name__} produced NaN logits", "the weights may be damaged")

    def keep(self, rows: torch.Tensor | slice, features_RMD: torch.Tensor) -> None:
        """Put features [R, M, D] into these rows."""
        if self.small:
            self.features[rows], self.scales[rows] = packed(features_RMD)
        else:
            self.features[rows] = features_RMD

    def kept(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """The features [..., M, D] of these rows in bfloat16; a view where they are kept so."""
        return unpacked(self.features[rows], self.scales[rows]) if self.small else self.features[rows]

    def _label(self) -> bytes:
        """What the cache is of; as long with any offsets."""
        return json.dumps([
            self.target.layer_ids, self.num_teacher, self.target.fingerprint(), self.small,
            hashlib.sha256(json.dumps([(r["prompt_ids"], r["answer_ids"]) for r in self.records]).encode()).hexdigest(),
            hashlib.sha256(json.dumps(self.offsets).encode()).hexdigest(),
        ]).encode()  # fmt: skip

    def _forget_if_foreign(self, directory: Path, sizes: dict[str, int]) -> None:
        """A cache of other records, layers or weights, or with a file that was cut, is deleted, not trusted."""
        label, wanted = directory / "cache.json", {name: size for name, size in sizes.items() if size}
        found = {file.name: file.stat().st_size for file in directory.glob("*.*")}
        if wanted | {label.name: len(self._label())} != found or label.read_bytes() != self._label():
            for file in directory.glob("*.*"):
                file.unlink()
            if wanted:
                directory.mkdir(parents=True, exist_ok=True)
                label.write_bytes(self._label())

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record, offset = self.records[index], self.offsets[index]
        if self.resident:
            self.fill([index])
        ids = torch.tensor(record["prompt_ids"] + record["answer_ids"], device=self.features.device)
        start, S = len(record["prompt_ids"]) - 1, self.lengths[index]
        if offset is None:
            features, *law = self._compute(ids[:-1], S - start)
            features = unpacked(*packed(features)) if self.small else features  # as it would be with room for it
            return Sample(ids, start, *(tensor.to(ids.device) for tensor in (features, *law)))
        rows = slice(offset, offset + S)
        answer_rows = slice(offset + start, offset + S)
        if not self.filled[index]:
            features, *law = self._compute(ids[:-1], S - start)  # copied from the target's device
            self.keep(rows, features)
            self.teacher_ids[answer_rows], self.teacher_probs[answer_rows] = law
            self.filled[index] = 1
        return Sample(ids, start, self.kept(rows), self.teacher_ids[answer_rows], self.teacher_probs[answer_rows])

    def _compute(self, ids: torch.Tensor, num_answer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scored = self.target.score(self.target.start(), ids.tolist(), num_logits=num_answer)
        return scored.features_TMD.bfloat16(), *teacher(scored.logits_TV, self.num_teacher)


def teacher(logits_RV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `count` tokens of each row and their probabilities, as they are stored."""
    top = logits_RV.topk(count, dim=-1)
    return top.indices.int(), (top.values - logits_RV.logsumexp(-1, keepdim=True)).exp().half()


def default_taps(num_layers: int) -> tuple[int, ...]:
    """Five layers spread from the second to the last, fewer in a small model."""
    count = min(5, num_layers)
    return (
        tuple(sorted({round(1 + (num_layers - 2) * i / max(1, count - 1)) for i in range(count)}))
        if num_layers > 2
        else tuple(range(num_layers))
    )


def token_bytes(M: int, D: int, num_teacher: int, dtype: str) -> int:
    """Of one token in the cache."""
    return M * (D + 4 if dtype == "float8" else 2 * D) + num_teacher * (4 + 2)


def packed(features_RMD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features in float8 and the scale [R, M] of each state: its largest number becomes float8's."""
    scale_RM = features_RMD.abs().amax(-1).float().clamp_min(1e-30) / torch.finfo(torch.float8_e4m3fn).max
    return (features_RMD.float() / scale_RM[..., None]).to(torch.float8_e4m3fn), scale_RM


def unpacked(features_RMD: torch.Tensor, scale_RM: torch.Tensor) -> torch.Tensor:
    return (features_RMD.float() * scale_RM[..., None]).bfloat16()


def fits_gpu(device: torch.device, num_bytes: float) -> bool:
    if device.type != "cuda":
        return False
    torch.cuda.empty_cache()  # what sampling left behind counts as free
    return num_bytes <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]


def mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor backed by a file. Its blocks are reserved now: a full disk found later would end the process
    with a bus error. Raises `SettingError` when they are not to be had."""
    size = torch.Size(shape).numel()
    try:
        with path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # the last one beyond ulimit -f
            raise SettingError(
                f"no space for the feature cache {path} ({size * dtype.itemsize / 1e9:.1f} GB)", "lower --cache-gb, or free some space"
            ) from error
        # other file systems cannot reserve; the tensor below then makes a sparse file
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
