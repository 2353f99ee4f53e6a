"""The target: a frozen Hugging Face causal LM seen as score / roll back.

Shapes: T rows of one forward pass, V vocabulary, M tapped layers, D hidden size."""

import copy
import hashlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from dspark.core.decode import Judge, Scored, judge_fast
from dspark.errors import LogitsError, PromptError, RuntimeUnavailable, TargetError
from dspark.target.delta import recorded
from dspark.target.graphs import Graphs, Slot
from dspark.target.native.judge import judge_natively
from dspark.target.native.runtime import NativeRuntime, Piece
from dspark.target.native.stack import Cache as NativeCache
from dspark.target.quantize import is_int8, rows_of
from dspark.target.rollback import Rollback, Snapshot, find_rollback, tensors_of
from dspark.target.selfcheck import check_rollback
from dspark.target.taps import Tap

# Rows per prefill pass: bounds activation memory on long prompts; any value gives the same state.
PREFILL_ROWS = 1024


@dataclass
class Undo:
    """What the last pass of a state brought, until the next `rollback`: its tokens, and what its snapshot layers held before it (None:
    a piece of a prompt, which is never rolled back)."""

    tokens: list[int]
    before: Snapshot | None


@dataclass
class State:
    """What the target remembers of one request: its cache holds `num_tokens` tokens."""

    cache: DynamicCache | NativeCache | Slot
    num_tokens: int = 0
    undo: Undo | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that the cache takes."""
        if isinstance(self.cache, NativeCache):
            return len(self.cache.pages) * self.cache.pool.page_bytes
        storages = [tensor.untyped_storage() for layer in self.cache.layers for tensor in tensors_of(vars(layer))]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())  # more than a view of it shows


@dataclass
class Target:
    """A loaded model. `model` and `tokenizer` are the user's own and stay usable as they are; the model is
    put into eval mode.

    `rollback_by` is auto, or snapshot: take a model whose caches no test covers, if it rolls back exactly here (selfcheck.py). Raises
    `TargetError` for models that cannot be rolled back exactly."""

    model: Any  # a PreTrainedModel; its own type hints do not know the families' attributes
    tokenizer: Any = None  # a PreTrainedTokenizerBase, or None
    name: str = ""
    layer_ids: tuple[int, ...] = ()
    runtime: NativeRuntime | None = None  # None: transformers' own modules, eagerly
    graphs: Graphs | None = None  # those modules' passes as CUDA graphs, for one request at a time
    rollback_by: str = "auto"
    mtp: Any = field(default=None, repr=False)  # its multi-token-prediction modules, once loaded; False: it has none (head/mtp.py)
    _captured: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)
    _hooks: list = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.forgets: Rollback = find_rollback(self.model, self.rollback_by)
        self.model.eval()
        self.text_config = self.model.config.get_text_config()
        self.layers = decoder_layers(self.model)
        if not self.forgets.trusted:
            check_rollback(self)

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def max_context(self) -> int:
        """Tokens the model's positions were made for; prompt and answer together must fit. Families
        without learned or rotary positions (BLOOM) name no limit."""
        return getattr(self.text_config, "max_position_embeddings", None) or sys.maxsize

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eos_ids(self) -> frozenset[int]:
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        eos = self.text_config.eos_token_id if eos is None else eos
        return frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)

    @property
    def judge(self) -> Judge:
        """What says which drafted tokens stand: natively where it decodes so."""
        return judge_fast if self.runtime is None else judge_natively

    @property
    def runtime_name(self) -> str:
        return "native" if self.runtime is not None else "eager" if self.graphs is None else "graph"

    def fingerprint(self) -> list:
        """What tells these weights from others: name, precision, shape, and a hash of the first output rows' bytes."""
        weights = self.model.get_output_embeddings().weight
        return [self.name, str(weights.dtype), list(weights.shape), self.digest()]

    def digest(self) -> str:
        """A hash of the first output rows, which differ with the precision too."""
        return hashlib.sha256(self.output_rows(torch.arange(64)).cpu().numpy().tobytes()).hexdigest()

    @property
    def precision(self) -> str:
        """int8, or the name of the weights' dtype."""
        return "int8" if is_int8(self.model.get_output_embeddings().weight) else str(self.model.dtype).removeprefix("torch.")

    def output_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the LM head in float32 [., D]."""
        return rows_of(self.model.get_output_embeddings().weight, ids.to(self.device))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The target's own input embedding, called as a module so that built-in scales apply (Gemma)."""
        return self.model.get_input_embeddings()(ids.to(self.device))

    def tap(self, layer_ids: Sequence[int]) -> None:
        """Record the outputs of these decoder layers (0-based, -1 = embeddings) in every pass.

        The states are the raw residual stream, before any norm, as DeepSpec trains on them."""
        self.untap()
        for layer_id in layer_ids:
            if not -1 <= layer_id < self.num_layers:
                raise TargetError(f"cannot tap layer {layer_id}: {self.name or 'target'} has {self.num_layers} layers")
            module = self.layers[layer_id] if layer_id >= 0 else self.model.get_input_embeddings()
            self._hooks.append(module.register_forward_hook(Tap(layer_id, self._captured)))
        self.layer_ids = tuple(layer_ids)

    def need(self, layer_ids: Sequence[int]) -> None:
        """Record these layers from the next pass on; no others are promised, and others that are recorded already stay."""
        if not set(layer_ids) <= set(self.layer_ids):
            self.tap(layer_ids)

    def of_layers(self, features_TMD: torch.Tensor, layer_ids: Sequence[int]) -> torch.Tensor:
        """The states of these layers, out of features that the present taps gave."""
        if self.layer_ids == tuple(layer_ids):
            return features_TMD
        return features_TMD[:, [self.layer_ids.index(layer_id) for layer_id in layer_ids]]

    def untap(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.layer_ids = [], ()
        self._captured.clear()

    def captured(self) -> torch.Tensor:
        """The tapped states of the last pass, [B, T, M, D]."""
        return torch.stack([self._captured[layer_id] for layer_id in self.layer_ids], dim=2)

    def start(self) -> State:
        """A state for one request. A model that was changed into one its runtime cannot run decodes eagerly, with a warning."""
        if self.runtime is not None:
            try:
                return State(self.runtime.start())
            except RuntimeUnavailable as reason:
                warnings.warn(f"decoding eagerly: {reason.message}", stacklevel=2)
        slot = None if self.graphs is None else self.graphs.start()
        return State(slot or self.forgets.new_cache())

    def score(self, state: State, tokens: Sequence[int], num_logits: int | None = None) -> Scored:
        """Append `tokens` to the state in one pass; logits for all rows, or the last `num_logits`.

        Raises `LogitsError` if the target's logits are not numbers."""
        scored = self.score_many([(state, tokens, len(tokens) if num_logits is None else num_logits)])[0]
        self.refuse_broken(scored, state.num_tokens - len(tokens))
        return scored

    @torch.inference_mode()
    def score_many(self, pieces: Sequence[tuple[State, Sequence[int], int]]) -> list[Scored]:
        """Append tokens to the states of several requests, natively in one pass: (state, tokens, num_logits) each.

        Logits of all rows, and the pass can be rolled back by any number of them; of fewer, and it is a piece of a prompt.
        A request's results do not depend on the others. The caller looks for broken logits (`refuse_broken`)."""
        if self.runtime is not None and all(isinstance(state.cache, NativeCache) for state, _, _ in pieces):
            described = [Piece(cast(NativeCache, state.cache), state.num_tokens, tokens, count) for state, tokens, count in pieces]
            scored = self.runtime.score(described, self.layer_ids)
        else:
            scored = [self._score_in_slot(*piece) if isinstance(piece[0].cache, Slot) else self._score_eagerly(*piece) for piece in pieces]
        for state, tokens, _ in pieces:
            state.num_tokens += len(tokens)
        return scored

    def _score_eagerly(self, state: State, tokens: Sequence[int], num_logits: int) -> Scored:
        cache, verifies = cast(DynamicCache, state.cache), num_logits == len(tokens)
        state.undo = Undo(list(tokens), self.forgets.remember(cache) if verifies else None)
        output = self._forward(cache, tokens, num_logits, verifies)
        features_TMD = self.captured()[0] if self.layer_ids else torch.empty(len(tokens), 0, self.hidden_size, device=self.device)
        return Scored(output.logits[0, output.logits.shape[1] - num_logits :].float(), features_TMD)

    def _score_in_slot(self, state: State, tokens: Sequence[int], num_logits: int) -> Scored:
        def forward(ids_1T: torch.Tensor, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
            logits_1TV = self.model(input_ids=ids_1T, past_key_values=cache, use_cache=True).logits
            none = torch.empty(ids_1T.shape[1], 0, self.hidden_size, device=ids_1T.device)
            return logits_1TV[0], self.captured()[0] if self.layer_ids else none

        assert self.graphs is not None
        logits_TV, features_TMD = self.graphs.rows(tokens, state.num_tokens, self.layer_ids, forward)
        return Scored(logits_TV[len(tokens) - num_logits :], features_TMD)

    def _forward(self, cache: DynamicCache, tokens: Sequence[int], num_logits: int, verifies: bool) -> Any:
        ids = torch.tensor([list(tokens)], device=self.device)
        keep = self.logits_to_keep(len(tokens), max(1, num_logits))  # 0 means all of them to transformers
        options = {self.forgets.cache_argument: cache, "use_cache": True, "logits_to_keep": keep}
        with recorded(verifies), self.forgets.as_decoded():
            return self.model(input_ids=ids, **options)

    def logits_to_keep(self, num_rows: int, num_logits: int) -> Any:
        """What asks the model for the last `num_logits` of a pass, and for the layers' outputs of all its rows: given a number, models with
        shared keys (Gemma 4) leave the other rows out of their last layers, which may be tapped; given positions they do not."""
        if not getattr(self.text_config, "num_kv_shared_layers", 0):
            return num_logits
        return torch.arange(num_rows - num_logits, num_rows, device=self.device)

    def refuse_broken(self, scored: Scored, num_tokens: int) -> None:
        """Raise `LogitsError` if these logits, of rows after `num_tokens` tokens, are not numbers."""
        broken = (
            -1 in scored.best_T if scored.best_T is not None else bool(scored.logits_TV.numel() and torch.isnan(scored.logits_TV.max()))
        )
        if broken:
            raise LogitsError(
                f"{self.name or type(self.model).__name__} produced NaN logits at token {num_tokens}",
                "the weights may be damaged, or the precision too low: try `--dtype float32`",
            )

    def prefill(self, state: State, tokens: Sequence[int]) -> torch.Tensor:
        """Append prompt tokens in bounded passes; returns their features_TMD."""
        parts = [torch.empty(0, len(self.layer_ids), self.hidden_size, dtype=self.model.dtype, device=self.device)]
        for start in range(0, len(tokens), PREFILL_ROWS):
            parts.append(self.score(state, tokens[start : start + PREFILL_ROWS], num_logits=1).features_TMD)
            self.rollback(state, 0)
        return torch.cat(parts)

    @torch.inference_mode()
    def rollback(self, state: State, num_rejected: int) -> None:
        """Forget the last `num_rejected` scored tokens; call it once after every `score`, with 0 too."""
        undo, state.undo = state.undo, None
        state.num_tokens -= num_rejected
        if isinstance(state.cache, NativeCache | Slot):
            return  # it overwrites what lies past its tokens
        if not num_rejected or not self.forgets.replays:
            self.forgets.crop(state.cache, num_rejected)
            return
        assert undo is not None and undo.before is not None, "the last pass was a piece of a prompt, or is rolled back already"
        self.forgets.restore(state.cache, undo.before, len(undo.tokens))
        accepted = undo.tokens[: len(undo.tokens) - num_rejected]
        if accepted:
            self._forward(state.cache, accepted, num_logits=1, verifies=True)
            self.forgets.crop(state.cache, 0)

    def can_shorten(self, state: State) -> bool:
        """Can its first tokens be had without the others, however many?"""
        return isinstance(state.cache, NativeCache | Slot) or self.forgets.can_shorten(state.cache)

    def fork(self, state: State, num_tokens: int) -> State | None:
        """A state of its own that holds the first `num_tokens` tokens of this one; None where the cache cannot give them: a sliding
        window has forgotten what it would need, and a recurrent state cannot be taken back. All tokens can always be had."""
        if isinstance(state.cache, NativeCache):
            return State(state.cache.fork(num_tokens), num_tokens)
        if isinstance(state.cache, Slot):
            copied = DynamicCache(config=self.model.config)
            for index, layer in enumerate(state.cache.layers if num_tokens else []):
                copied.update(layer.keys[:, :, :num_tokens].clone(), layer.values[:, :, :num_tokens].clone(), index)
            return State(copied, num_tokens)
        if num_tokens < state.num_tokens and not self.can_shorten(state):
            return None
        forked = State(copy.deepcopy(state.cache), num_tokens)
        self.forgets.crop(cast(DynamicCache, forked.cache), state.num_tokens - num_tokens)
        return forked

    def prompt_ids(self, messages: str | list[dict], raw: bool = False, tools: list[dict] | None = None) -> list[int]:
        """Token ids of one user turn, or of a chat, with the generation prompt; `raw` skips the template, which gets the `tools`."""
        if self.tokenizer is None:
            raise PromptError("this target has no tokenizer", "pass token ids instead of text")
        plain = raw or self.tokenizer.chat_template is None
        if plain and not isinstance(messages, str):
            raise PromptError("a chat needs a chat template, and none applies here", "give `prompt` instead of `messages`")
        chat = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        try:
            if plain:
                return self.tokenizer(messages).input_ids
            text = self.tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False).input_ids
        except Exception as error:  # a template is a program of the target's maker and may raise anything
            raise PromptError(f"the chat template or tokenizer cannot take this chat: {str(error) or type(error).__name__}") from error


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The list of decoder layers, under the names the families use."""
    decoder = model.get_decoder()
    for attribute in ("layers", "h"):
        if hasattr(decoder, attribute):
            return getattr(decoder, attribute)
    raise TargetError(f"cannot find the decoder layers of {type(model).__name__}")


def final_norm(model: PreTrainedModel) -> torch.nn.Module:
    """The norm between the last decoder layer and the output rows, under the names the families use."""
    decoder = model.get_decoder()
    for attribute in ("norm", "norm_f", "embedding_norm", "ln_f"):
        if hasattr(decoder, attribute):
            return getattr(decoder, attribute)
    raise TargetError(f"cannot find the final norm of {type(model).__name__}")
