"""Recording what a layer gives, in a forward hook that changes nothing."""

from typing import Any

import torch


class Tap:
    """A forward hook that keeps its layer's last output [B, T, D] in `captured`; of several residual streams (DeepSeek-V4: [B, T, streams,
    D]) the mean. Copies of it, in a copy or a file of the model, keep theirs elsewhere."""

    def __init__(self, layer_id: int, captured: dict[int, torch.Tensor] | None = None):
        self.layer_id, self.captured = layer_id, {} if captured is None else captured

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        self.captured[self.layer_id] = states.mean(2) if states.dim() == 4 else states

    def __reduce__(self):
        return Tap, (self.layer_id,)
