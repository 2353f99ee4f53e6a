"""Sequential heads: the bias that the tokens already drawn in a block add to the base logits (paper eq. 4-6).

Each maps (W1[x_prev], h, state) to a vector z of size r; the bias is W2 z. So a shortlist of
tokens needs only those rows of W2. Shapes: r Markov rank, D hidden, V vocabulary, Vd draft vocabulary."""

import torch
from torch import nn

from dspark.config import HeadConfig


class Vanilla(nn.Module):
    """B = W1[x_prev] W2 (eq. 5)."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.draft_vocab_size, bias=False)

    def step(self, w: torch.Tensor, h: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(w [..., r], h [..., D], state) -> (z [..., r], state); the state of a block's first token is None."""
        return w, None


class Gated(Vanilla):
    """z = sigmoid(G [h; w]) * w."""

    def __init__(self, config: HeadConfig):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size + config.markov_rank, config.markov_rank)

    def step(self, w, h, state):
        return torch.sigmoid(self.gate_proj(torch.cat([h, w], dim=-1))) * w, None


class Rnn(Vanilla):
    """A gated recurrent state over the block; joint_proj's rows are gate, candidate, output (eq. 6)."""

    def __init__(self, config: HeadConfig):
        super().__init__(config)
        self.joint_proj = nn.Linear(2 * config.markov_rank + config.hidden_size, 3 * config.markov_rank)

    def step(self, w, h, state):
        state = torch.zeros_like(w) if state is None else state
        gate, candidate, output = self.joint_proj(torch.cat([state, w, h], dim=-1)).chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)


KINDS = {"vanilla": Vanilla, "gated": Gated, "rnn": Rnn}


class Confidence(nn.Module):
    """Logit of the chance that x_k is accepted given that all before it were (eq. 7)."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.with_markov = config.confidence_head_with_markov and config.markov_rank > 0
        self.proj = nn.Linear(config.hidden_size + (config.markov_rank if self.with_markov else 0), 1)

    def forward(self, h: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
        """Hidden states [..., D] and W1[x_prev] [..., r] (None without a sequential head) -> logits [...]."""
        return self.proj(h if w is None or not self.with_markov else torch.cat([h, w], dim=-1))[..., 0]
