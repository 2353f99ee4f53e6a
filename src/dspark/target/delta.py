"""Gated delta rule layers (Qwen3-Next, Qwen3.5, Qwen3.6) that can forget rejected tokens.

A recurrent state cannot be cropped, and a copy of it after each row would take hundreds of megabytes. So a pass that may be rolled
back keeps what its rows brought to the state (keys, values, decay, step size: small) and the state before it; the accepted rows
are then applied again to the old state. Such a pass also runs the step-by-step rule that plain decoding uses, not the rule by
chunks that transformers takes for several rows: given the same inputs, its outputs and the recomputed state are those of plain decoding
to the bit.

Shapes: B rows of a batch, T tokens, H heads, K key size, V value size."""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from dspark.config import MAX_BLOCK
from dspark.errors import TargetError

# The names under which transformers 5.23 calls its kernels in the files of these families.
BY_CHUNKS, STEP_BY_STEP = "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"
# Longer passes go by chunks: a step costs some 10 small operations a layer. The longest block with its anchor still goes by steps.
MOST_STEPS = MAX_BLOCK + 1


@dataclass
class Steps:
    """What the rows of one pass bring to a recurrent state: keys BTHK, values BTHV, log decay and step size BTH, and the rule."""

    key: torch.Tensor
    value: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    rule: Callable
    options: dict[str, Any]

    @property
    def num_rows(self) -> int:
        return self.key.shape[1]

    def applied(self, state: torch.Tensor | None, num_rows: int) -> torch.Tensor:
        """The state after the first `num_rows` rows, by the operations of plain decoding."""
        key, value, g, beta = (rows[:, :num_rows] for rows in (self.key, self.value, self.g, self.beta))
        # the query decides about the output only
        return self.rule(key, key, value, g=g, beta=beta, initial_state=state, output_final_state=True, **self.options)[1]


class Pass(threading.local):
    """Of this thread: may the pass under way be rolled back, and what did the last layer's rows bring?"""

    recording = False
    steps: Steps | None = None


current = Pass()


@contextmanager
def recorded(recording: bool) -> Iterator[None]:
    """Within it, passes of this thread keep what a roll-back of them needs."""
    current.recording, before = recording, current.recording
    try:
        yield
    finally:
        current.recording, current.steps = before, None


class GatedDeltaLayer(LinearAttentionLayer):
    """The cache of one layer. `crop(-n)` forgets the last n tokens of a pass that was recorded, `crop(0)` what it kept for that."""

    def __init__(self, number_of_states: int = 1):
        super().__init__(number_of_states=number_of_states)
        self.activate_past_recording()  # of the convolution's window
        self.before: torch.Tensor | None = None
        self.steps: Steps | None = None

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        """Keep the new state beside the old one; transformers' own layer writes over it."""
        if current.recording:
            self.before, self.steps = self.recurrent_states[state_idx], current.steps
            current.steps = None
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self.recurrent_states[0] = self._without(-tokens_to_remove)
        self.before = self.steps = None
        super().crop(tokens_to_remove)
        for index, window in self.conv_states.items():
            if window is not None:
                self.conv_states[index] = window.clone()  # the crop is a view of all rows of the pass

    def _without(self, num_rejected: int) -> torch.Tensor | None:
        if self.steps is None or num_rejected > self.steps.num_rows:
            raise TargetError(
                "a gated delta layer has not kept what a roll-back needs: its kernel was replaced, or the pass was no verify pass",
                "load the model without kernels from the hub",
            )
        kept = self.steps.num_rows - num_rejected
        return self.steps.applied(self.before, kept) if kept else self.before


def watch_kernels(model: PreTrainedModel) -> bool:
    """Let the gated delta kernels that this model's files call be recorded; False if there are none.

    They are replaced in transformers' module by functions that do the same unless `recorded` is in force in their thread."""
    files = {type(module).__module__ for module in model.modules()}
    watched = [file for file in files if all(hasattr(sys.modules[file], name) for name in (BY_CHUNKS, STEP_BY_STEP))]
    for file in watched:
        namespace = vars(sys.modules[file])
        chunks, steps = namespace[BY_CHUNKS], namespace[STEP_BY_STEP]
        if not hasattr(chunks, "unwatched"):
            namespace[BY_CHUNKS], namespace[STEP_BY_STEP] = watched_rule(chunks, steps), watched_rule(steps, steps)
    return bool(watched)


def watched_rule(rule: Callable, step_by_step: Callable) -> Callable:
    """`rule`, which in a recorded pass of few rows runs `step_by_step` and leaves its inputs to the cache layer."""

    @functools.wraps(rule)
    def call(query, key, value, g, beta, initial_state=None, output_final_state=False, **options):
        if not current.recording:
            return rule(query, key, value, g=g, beta=beta, initial_state=initial_state, output_final_state=output_final_state, **options)
        chosen = step_by_step if key.shape[1] <= MOST_STEPS else rule
        found = chosen(query, key, value, g=g, beta=beta, initial_state=initial_state, output_final_state=output_final_state, **options)
        current.steps = Steps(key, value, g, beta, step_by_step, options)
        return found

    call.unwatched = rule  # type: ignore[attr-defined]
    return call
