"""Settings as frozen dataclasses; each default is written once, here, with its reason."""

from dataclasses import dataclass

# Most multiplications of one token's bias that are done for the whole draft vocabulary. The demo target's head needs
# 1.3 million; the bound itself was not measured.
CHEAP_BIAS = 2**22
WINDOW_STEP = 32  # tokens of a page of keys and values
MAX_BLOCK = 64  # tokens of a block: far more than ever stand
SEQUENTIAL_HEADS = ("vanilla", "gated", "rnn")
RECURRENT_KINDS = ("mtp", "eagle3")
KINDS = ("dspark", "dflash", *RECURRENT_KINDS)  # of heads that are trained here


@dataclass(frozen=True)
class Sizes:
    """What every kind of head has. Names are the target's config's where it has one, else DeepSpec's."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    vocab_size: int
    draft_vocab_size: int
    block_size: int  # tokens of a draft
    target_layer_ids: tuple[int, ...]
    num_target_layers: int


@dataclass(frozen=True)
class HeadConfig(Sizes):
    """The shape of a head. Names are DeepSpec's where DeepSpec has one."""

    num_hidden_layers: int
    mask_token_id: int
    markov_rank: int
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    # Best tokens of each base row that the sequential head may choose from, since its bias is needed for these only.
    # 0: all of the draft vocabulary while its bias is cheap. The bias promotes tokens from far down: with the best 64 of
    # 8,192 alone the demo target's head gives 3% fewer tokens a round at T = 0 (bench/results).
    shortlist: int = 0
    # Tokens of context that a block sees, the last ones, and up to 31 more: a window begins at a page of keys and values. 0: all.
    # Beyond distances that it was trained at, a head goes astray: the demo target's gives 1.6 tokens a round behind 8,000 tokens, and
    # with a window of 512 as many as behind 256 (bench/results).
    window: int = 0

    def first_seen(self, num_tokens: int) -> int:
        """Where the context of a block after so many tokens begins."""
        return max(0, num_tokens - self.window) // WINDOW_STEP * WINDOW_STEP if self.window else 0

    @property
    def context_numbers(self) -> int:
        """Numbers that a token leaves in a context: keys and values of every layer."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    @property
    def num_choices(self) -> int:
        """Tokens of each row that a draft chooses from."""
        cheap = self.draft_vocab_size * max(self.markov_rank, 1) <= CHEAP_BIAS
        return min(self.shortlist or (self.draft_vocab_size if cheap else 1024), self.draft_vocab_size)


@dataclass(frozen=True)
class RecurrentConfig(Sizes):
    """The shape of a head that drafts a token a pass, each from its own last state."""

    kind: str  # of RECURRENT_KINDS
    trained_steps: int  # passes of the chain that training went through; a draft may take more

    @property
    def enable_confidence_head(self) -> bool:
        return False


@dataclass(frozen=True)
class TrainConfig:
    """How a head is trained. The paper's recipe (AdamW, cosine, clip 1.0, exp(-k/4)) scaled to two cores."""

    seed: int = 0
    num_prompts: int = 3000  # instructions the target invents when it is given none
    kinds: tuple[str, ...] = ()  # of openers they start from; none named: all
    max_answer_tokens: int = 160
    steps: int = 2000
    sequences_per_step: int = 12
    anchors_per_sequence: int = 64
    warmup: float = 0.04
    learning_rate: float = 6e-4
    muon_learning_rate: float = 0.01
    clip: float = 1.0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    teacher_ce: bool = False  # cross entropy with the teacher law instead of the sampled token
    ce_weight: float = 0.1
    l1_weight: float = 0.9
    confidence_weight: float = 1.0
    detached_confidence: bool = False  # its loss trains the confidence head alone, not the states it reads
    decay: float = 4.0  # position weights exp(-k/decay), as in DeepSpec's code
    teacher_tokens: int = 32  # target probabilities kept a token; the softmax over all costs as much as the head
    held_out: int = 64  # answers never trained on
    checkpoint_seconds: float = 50.0
    cache_gigabytes: float = 4.0
    feature_dtype: str = "bfloat16"  # float8: half the bytes; each state rounded to 3 bits of mantissa, beside a scale


# `dspark adapt`: the head knows its trade already, so a fifth of the steps of `train`. Its loss is `distil` (cli/adapt.py), with which the
# shipped head was trained (bench/results/smollm2-135m-training.md).
ADAPT = TrainConfig(num_prompts=800, steps=400, learning_rate=1.5e-3)  # measured in docs/adapting.md
LOW_RANK_RATE = 1e-3  # learning rate of low-rank updates: their factors start at 0 and are few
