"""`core/verifier.py: verify` through stack.cpp, where laws are plain rows in memory.

The target's laws are torch's, as in the reference. The sums over the vocabulary run in another order here, so a verdict can differ where a uniform
number lies within a few units of rounding of its border."""

import ctypes
from typing import Any

import torch

from dspark.core.decode import Scored, judge_fast, row_laws
from dspark.core.sampling import Law, Streams
from dspark.core.verifier import Draft, FewTokens, Verdict
from dspark.target.native.build import compiled


class Judging(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("target", "ids", "chances", "tokens", "uniforms")],
        *[(name, ctypes.c_int64) for name in ("ids_distance", "chances_distance", "next")],
        *[(name, ctypes.c_int32) for name in ("num_tokens", "num_choices", "vocabulary")],
    ]


def judge_natively(law: Law, ids: list[int], draft: Draft, num_planned: int, scored: Scored, streams: Streams) -> Verdict:
    """`judge_fast`, and natively where no processor reads the text and the draft's laws are over few tokens."""
    few: Any = draft.probs_KV
    size = scored.logits_TV.shape[-1]
    if law.greedy or law.processors or size % 16 or (num_planned and not fits(few)):
        return judge_fast(law, ids, draft, num_planned, scored, streams)
    drafted = draft.tokens[:num_planned]
    laws = row_laws(law, ids, drafted, scored.logits_TV).contiguous()
    numbers = [*Streams.uniforms(streams.accept, num_planned), *Streams.uniforms(streams.recover, 1)]
    tokens, uniforms = (ctypes.c_int64 * num_planned)(*drafted), (ctypes.c_double * len(numbers))(*numbers)
    described = Judging(
        target=laws.data_ptr(),
        tokens=ctypes.addressof(tokens),
        uniforms=ctypes.addressof(uniforms),
        num_tokens=num_planned,
        vocabulary=size,
    )
    if num_planned:
        described.ids, described.ids_distance = few.ids_KC.data_ptr(), few.ids_KC.stride(0)
        described.chances, described.chances_distance = few.probs_KC.data_ptr(), few.probs_KC.stride(0)
        described.num_choices = few.ids_KC.shape[1]
    return Verdict(compiled().stack_judge(ctypes.byref(described)), described.next)


def fits(few: Any) -> bool:
    """Are these rows as stack.cpp reads them?"""
    return (
        isinstance(few, FewTokens)
        and few.probs_KC.device.type == "cpu"
        and (few.ids_KC.dtype, few.probs_KC.dtype) == (torch.int64, torch.float32)
        and (few.ids_KC.stride(-1), few.probs_KC.stride(-1)) == (1, 1)
    )
