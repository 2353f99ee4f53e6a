"""From a prompt to text: builds the law, the drafter and the stopping rule, and runs the loop."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dspark.core.calibration import OnlineCalibration
from dspark.core.decode import Drafter, Round, decode
from dspark.core.planner import Adaptive, Always, DraftedBy, EarlyStop, Lagged, Planner, Seeded, Table, always
from dspark.core.sampling import Law, Streams
from dspark.drafters import Arbiter, DSparkDrafter, MtpDrafter, NoDrafter, PromptLookup, SeededDrafter
from dspark.drafters.arbiter import GUESS_TRUST, GUESSED, LOOKUP_TOKENS, NOMINAL
from dspark.errors import PromptError, SettingError
from dspark.head.mtp import MtpHead, load_mtp, own_mtp
from dspark.head.recurrent import AnyHead, RecurrentHead
from dspark.limits import ADAPTIVE, check_law, check_length, check_names, check_settings
from dspark.profiling import planning_costs
from dspark.target.target import Target
from dspark.text import TextStream
from dspark.warpers import UnsortedTopP

# transformers' processors that read the logits alone; all others also get the tokens before the row.
PREFIX_FREE = (TemperatureLogitsWarper, TopKLogitsWarper, UnsortedTopP, MinPLogitsWarper)
# Processors that remember earlier calls: replaying a row after a rejection would feed them tokens that never were.
STATEFUL = ("SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor", "WhisperTimeStampLogitsProcessor")
DEFAULT_DRAFTER, DEFAULT_PLAN = "auto", "auto"


@dataclass(frozen=True)
class Result:
    """One answer. `token_ids` are the new tokens, the end token included when it was produced;
    `tau` is new tokens per round; `rounds_log` tells what each round drafted, planned and accepted."""

    token_ids: list[int]
    text: str
    rounds: int
    seconds: float
    finish_reason: str
    rounds_log: list[Round]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tau(self) -> float:
        return self.num_tokens / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0


def make_law(
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    logits_processors: Sequence[Callable] = (),
) -> Law:
    """The sampling law of these settings, in transformers' order. Raises `SettingError` for values without meaning.

    At temperature 0 the warpers are left out: they never remove the best token."""
    check_law(temperature, top_k, top_p, min_p, repetition_penalty)
    processors = list(logits_processors)
    if repetition_penalty != 1.0:
        processors.insert(0, RepetitionPenaltyLogitsProcessor(repetition_penalty))
    warpers: list[Callable] = []
    if temperature > 0:
        warpers += [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
        warpers += [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        warpers += [MinPLogitsWarper(min_p)] if min_p else []
    return split_law(LogitsProcessorList(processors + warpers), greedy=temperature == 0)


def split_law(processors: Sequence[Callable], greedy: bool) -> Law:
    """A law from transformers' list: the longest tail of prefix-free processors becomes the warpers, and top-p goes without sorting."""
    processors = [UnsortedTopP.like(p) if type(p) is TopPLogitsWarper else p for p in processors]
    for processor in processors:
        if type(processor).__name__ in STATEFUL:
            raise SettingError(
                f"{type(processor).__name__} keeps state between calls and cannot be applied to speculated rows",
                "decode plainly (`--head none`, or `dspark.ungraft(model)`) to use it",
            )
    split = len(processors)
    while split and type(processors[split - 1]) in PREFIX_FREE:
        split -= 1
    return Law(tuple(processors[:split]), tuple(processors[split:]), greedy)


def make_drafter(name: str | None, target: Target, head: AnyHead | None) -> Drafter:
    """The drafter of this name; None: auto, or none without a head and what stands for modules. Raises `SettingError` when the name or the head does not fit.

    auto chooses round by round between the head, the target's own multi-token-prediction modules where its checkpoint has some, and
    prompt lookup; it needs a head or modules, and a head of the kind mtp or eagle3 takes the modules' place. mtp and eagle3 are such a head alone,
    mtp without one the target's own modules alone (`HeadError` where it has none), mtp+dspark takes their first token and lets the head go on from it."""
    if isinstance(head, RecurrentHead) and name in (None, "auto", head.kind):
        chain = MtpDrafter(head, target)
        return chain if (name or DEFAULT_DRAFTER) != "auto" else beside_lookup(chain, target)
    if name is None and head is None:
        name = "auto" if isinstance(target.mtp, RecurrentHead) else "none"  # a trained head that stands for the target's modules drafts
    name = name or DEFAULT_DRAFTER
    check_names(name)
    if name == "none":
        return NoDrafter()
    if name == "lookup":
        return PromptLookup(target.vocab_size, device=target.device)
    if name == "mtp":
        return MtpDrafter(load_mtp(target), target)
    modules = own_mtp(target, warn) if name == "auto" else None
    mtp = None if modules is None else MtpDrafter(modules, target)
    if head is None and mtp is not None:
        return beside_lookup(mtp, target)
    if head is None:
        raise SettingError(
            f"drafter {name!r} needs a head, and there is none",
            "pass `--head DIR`, or train one: `dspark train`",
        )
    if isinstance(head, RecurrentHead) or name == "eagle3":
        raise SettingError(f"drafter {name!r} needs a head of another kind; this one is {head.kind}", f"use `--drafter {head.kind}`")
    if name == "dflash" and head.config.markov_rank:
        raise SettingError(
            "drafter 'dflash' needs a head of rank 0; this one has a sequential head", "use `--drafter dspark`, or pass a DFlash head"
        )
    drafter = DSparkDrafter(head, target)
    if name == "mtp+dspark":
        return SeededDrafter(MtpDrafter(load_mtp(target), target), drafter)
    if name != "auto":
        return drafter
    lookup = PromptLookup(target.vocab_size, LOOKUP_TOKENS, target.device)
    return Arbiter(drafter, lookup, *usual_acceptance(drafter), mtp)


def beside_lookup(mtp: MtpDrafter, target: Target) -> Arbiter:
    """Modules and prompt lookup, by round."""
    return Arbiter(None, PromptLookup(target.vocab_size, LOOKUP_TOKENS, target.device), [GUESSED], GUESS_TRUST, mtp)


def warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def usual_acceptance(drafter: Drafter) -> tuple[Sequence[float], float]:
    """The chance of each drafted token, given those before it, to start planning with, and for how many rounds that counts: the
    greedy one of a calibrated head, else a guess."""
    calibration = drafter.head.calibration if isinstance(drafter, DSparkDrafter) else None
    if calibration is None:
        return [GUESSED] * drafter.block_size, GUESS_TRUST
    return calibration.nearest(0.0).acceptance, 16.0


def make_planner(spec: str | None, target: Target, drafter: Drafter, say: Callable[[str], None] = lambda text: None) -> Planner:
    """The planner that `spec` names, one of `limits.PLANS`; None: auto. Raises `SettingError` for another, and for a length that the
    drafter never drafts.

    online is auto with confidences corrected by what was accepted so far. Both, early-stop and lagged need this machine's costs, which are measured at first use (profiling.py).
    An adaptive planner remembers the rounds it has seen: hand one object to many calls to keep what it learned,
    a name to start each call alike, which is what lets a seed replay at a temperature above 0."""
    spec = DEFAULT_PLAN if spec is None else spec
    check_names(plan=spec)
    lengths: Planner | None = always(spec)
    if drafter.block_size == 0:
        return Always()
    check_length(spec, drafter.block_size)
    if lengths is not None:
        return drafter.plan_with(NOMINAL, lengths) if isinstance(drafter, Arbiter) else lengths
    models = drafter.models if isinstance(drafter, Arbiter | SeededDrafter) else [drafter]
    heads: list[AnyHead | MtpHead | None] = [model.head for model in models if isinstance(model, DSparkDrafter | MtpDrafter)]
    first, *others = (planning_costs(target, head, 1 + drafter.block_size, say) for head in heads or [None])
    table: Table = first
    if isinstance(drafter, SeededDrafter):
        table = Seeded(first, others[0], drafter.mtp.block_size - 1)
    if spec not in ADAPTIVE:
        lengths = Lagged(table) if spec == "lagged" else EarlyStop(table)
    if isinstance(drafter, Arbiter):
        return drafter.plan_with(table, lengths, spec == "online", *(DraftedBy(table, other) for other in others))
    return lengths or Adaptive(
        table, *usual_acceptance(drafter), online=OnlineCalibration(drafter.block_size) if spec == "online" else None
    )


def stream(
    target: Target,
    head: AnyHead | None,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int = 256,
    law: Law,
    seed: int = 0,
    drafter: str | Drafter | None = None,
    stop: str | Sequence[str] = (),
    eos_ids: frozenset[int] | None = None,
    plan: str | Planner | None = None,
) -> Iterator[Round]:
    """Yield the rounds of one answer as they happen; `generate` collects them."""
    stop = as_strings(stop)
    check_request(target, prompt_ids, max_new_tokens, seed, stop)
    chosen = make_drafter(drafter, target, head) if drafter is None or isinstance(drafter, str) else drafter
    planner = make_planner(plan, target, chosen) if plan is None or isinstance(plan, str) else plan
    finished = stopping_rule(target, target.eos_ids if eos_ids is None else eos_ids, stop)
    yield from decode(target, chosen, prompt_ids, law, Streams(seed), max_new_tokens, finished, planner, target.judge)


def generate(
    target: Target,
    head: AnyHead | None,
    prompt_ids: Sequence[int],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    *,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    logits_processors: Sequence[Callable] = (),
    on_text: Callable[[str], None] | None = None,
    **options,
) -> Result:
    """Continue `prompt_ids` (a list of token ids) with the target's own law, drafted by `head` (None: plainly).

    `max_new_tokens` counts exactly; `stop` ends the text before any of the given strings;
    `drafter` overrides the head's own ("lookup", "none", or an object); `plan` says how much to speculate, a name of
    `limits.PLANS` or an object (`make_planner`); it changes the speed, not the law; `on_text` receives text
    as it becomes final. The same seed replays the same tokens. Raises the `UserError` family."""
    law = make_law(temperature, top_k, top_p, min_p, repetition_penalty, logits_processors)
    stop = options["stop"] = as_strings(options.get("stop", ()))
    rounds, ids = [], []
    texts = None if target.tokenizer is None else TextStream(target.tokenizer, stop)
    begin = time.perf_counter()
    for done in stream(target, head, prompt_ids, max_new_tokens=max_new_tokens, law=law, seed=seed, **options):
        rounds.append(done)
        ids += done.tokens
        say(texts.push(done.tokens) if texts else "", on_text)
    seconds = time.perf_counter() - begin
    say(texts.finish() if texts else "", on_text)
    text = texts.text if texts else ""
    eos = target.eos_ids if options.get("eos_ids") is None else options["eos_ids"]
    ended = bool(ids) and (ids[-1] in eos or (bool(stop) and contains_stop(target, ids, stop)))
    return Result(ids, text, len(rounds), seconds, "stop" if ended else "length", rounds)


def as_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)


def check_request(target: Target, prompt_ids: Sequence[int], max_new_tokens: int, seed: int, stop: Sequence[str]) -> None:
    """Values are checked here, once, at the border."""
    if isinstance(prompt_ids, str):
        raise PromptError("the prompt is text, and token ids are wanted", "make them of it: target.prompt_ids(text)")
    if getattr(prompt_ids, "ndim", 1) != 1 or any(isinstance(t, list | tuple) for t in prompt_ids):
        raise PromptError("the prompt is a batch, and one prompt's token ids are wanted", "give them as one list of numbers")
    if len(prompt_ids) == 0:
        raise PromptError("the prompt is empty", "give at least one token; a chat template always does")
    check_settings(max_new_tokens, seed, stop)
    bad = [t for t in prompt_ids if not 0 <= t < target.vocab_size]
    if bad:
        raise PromptError(f"token id {bad[0]} is outside the target's vocabulary of {target.vocab_size}")
    if len(prompt_ids) + max_new_tokens > target.max_context:
        room = target.max_context - len(prompt_ids)
        raise PromptError(
            f"prompt of {len(prompt_ids)} tokens plus {max_new_tokens} new ones exceeds the target's context of {target.max_context}",
            f"shorten the prompt, or ask for at most {room} new tokens" if room > 0 else "shorten the prompt",
        )
    if stop and target.tokenizer is None:
        raise SettingError("stop strings need a tokenizer, and this target has none")


def stopping_rule(target: Target, eos_ids: frozenset[int], stop: Sequence[str]) -> Callable[[list[int]], bool]:
    def finished(new_ids: list[int]) -> bool:
        return new_ids[-1] in eos_ids or (bool(stop) and contains_stop(target, new_ids, stop))

    return finished


def contains_stop(target: Target, new_ids: Sequence[int], stop: Sequence[str]) -> bool:
    # A stop string of n characters ends within the last n tokens at most, if a token is a character or more;
    # byte tokens may be less, hence the factor.
    tail = target.tokenizer.decode(new_ids[-4 * max(map(len, stop)) - 8 :], skip_special_tokens=True)
    return any(s in tail for s in stop)


def say(text: str, on_text: Callable[[str], None] | None) -> None:
    if text and on_text is not None:
        on_text(text)
