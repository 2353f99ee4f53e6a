"""Head, multi-token-prediction modules, prompt lookup and none in turns: whoever drafts in a round, each drafter's state stays that of the
accepted text, and the text stays the target's. In the reference loop, the engine, a grafted model and the commands."""

import itertools
import json
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import dspark
from dspark.cli.main import main
from dspark.core.decode import decode
from dspark.core.planner import Always, Costs, CostTable, DraftedBy
from dspark.core.sampling import GREEDY, Coupled, Streams
from dspark.core.verifier import Draft, FewTokens
from dspark.drafters import Arbiter, DSparkDrafter, MtpDrafter, PromptLookup, SeededDrafter
from dspark.drafters.arbiter import NOMINAL
from dspark.engine.engine import Engine
from dspark.engine.load import Load
from dspark.engine.request import Request
from dspark.errors import HeadError, SettingError
from dspark.generation import generate, make_drafter, make_law, make_planner
from dspark.head.mtp import MtpHead, load_mtp, own_mtp
from dspark.target.load import load_target
from dspark.target.native.runtime import NativeRuntime
from dspark.target.target import Target
from dspark.train.run import begin_head, check_shape
from dspark.train.warmstart import new_head
from mtp_checkpoints import ALSO_WITH_MTP, WITH_MTP, save_with_mtp
from oracle import plain_greedy
from saved import byte_tokenizer, save_tiny_target
from test_arbiter import Head, Table
from test_chi_square import tiny_modules
from test_engine import mixed_requests, reference, serve
from test_mtp import ROUNDING, Compared, committed, drafted
from tiny import NATIVE_SHAPE, tiny_head, tiny_model, tiny_recurrent

PROMPT = [3, 17, 99, 45, 8, 8, 101, 64, 3, 17, 99]  # longer than the tiny models' window of 8
NUM_NEW = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return cache(lambda family: save_with_mtp(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="module")
def targets(folders):
    return cache(lambda family: load_target(folders(family)))


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Costs from a table: nothing here depends on them, and to measure takes long."""
    monkeypatch.setattr("dspark.engine.engine.measured_load", lambda *measured: Load(NOMINAL, {}))
    for place in ("engine.engine", "generation"):
        monkeypatch.setattr(f"dspark.{place}.planning_costs", lambda *measured: NOMINAL)


class AtRandom(Arbiter):
    """Whoever can draft, or nobody, by dice, the lookup first; all that was drafted is verified."""

    games = itertools.count()

    def plan_with(self, *settings, **more):
        self.dice, self.turns = random.Random(next(AtRandom.games)), []
        return super().plan_with(NOMINAL, Always())

    def choose(self, choices, limit, num_tokens):
        order = self.dice.sample(choices, len(choices)) if self.dice.random() < 0.8 else []
        order = order if self.turns else choices[::-1]
        self.turns.append(order[0] if order else None)
        return order


class ComparedHead(DSparkDrafter):
    """Looks in every draft whether one that has seen only the accepted text would draft the same."""

    num_compared = 0

    def draft(self, ids, limit, law, noise):
        made = super().draft(ids, limit, law, noise)
        fresh = committed(DSparkDrafter(self.head, self.target), self.target, list(ids))
        other = DSparkDrafter.draft(fresh, ids, limit, law, noise)
        assert made.tokens == other.tokens
        assert made.confidences == pytest.approx(other.confidences, abs=ROUNDING)
        self.num_compared += 1
        return made


class Stale(Compared):
    """Modules that miss what became final in rounds that others drafted."""

    drew = True  # the prompt

    def draft(self, ids, limit, law, noise):
        self.drew = True
        return super().draft(ids, limit, law, noise)

    def commit(self, features_TMD):
        super().commit(features_TMD if self.drew else torch.zeros_like(features_TMD))
        self.drew = False


def turns_of(target: Target, modules: type[MtpDrafter] = Compared, head: type[DSparkDrafter] = ComparedHead, kind=AtRandom) -> Arbiter:
    lookup = PromptLookup(target.vocab_size, 6)
    return kind(head(tiny_head(target), target), lookup, [0.5] * 4, 8.0, modules(load_mtp(target), target))


@pytest.mark.parametrize("family", WITH_MTP | ALSO_WITH_MTP)
def test_another_drafter_in_every_round_changes_neither_text_nor_state(family, targets):
    target = targets(family)
    arbiter = turns_of(target)
    said = [token for done in decode(target, arbiter, PROMPT, GREEDY, Streams(0), NUM_NEW, planner=arbiter) for token in done.tokens]
    assert said == plain_greedy(target, PROMPT, NUM_NEW)
    assert arbiter.mtp.num_compared > 2 and arbiter.head.num_compared > 2
    assert len({id(turn) for turn in arbiter.turns}) >= 4  # head, modules, nobody, a size of the lookup


def test_modules_that_missed_a_round_would_be_seen(targets):
    target = targets("step3p7")
    arbiter = turns_of(target, Stale)
    with pytest.raises(AssertionError):
        list(decode(target, arbiter, PROMPT, GREEDY, Streams(0), NUM_NEW, planner=arbiter))


class TableModules(Head):
    layer_ids = ()

    class target:
        @staticmethod
        def need(layer_ids):
            pass


def test_the_drafter_that_gives_most_tokens_a_millisecond_draws_most():
    """Both are always right. The modules' three tokens cost less than the head's four, or more."""
    text = torch.randint(50, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    for dear, cheap in (("head", "mtp"), ("mtp", "head")):
        drafts = {dear: 2.5, cheap: 0.1}
        head, mtp = Head(text, True), TableModules(text, True)
        head.layer_ids, mtp.block_size = (), 3
        table, other = (CostTable((0,), (Costs(drafts[name], tuple(1 + 0.01 * k for k in range(17))),)) for name in ("head", "mtp"))
        arbiter = Arbiter(head, PromptLookup(50, 15), [0.5] * 4, 8.0, mtp).plan_with(table, mtp_table=DraftedBy(table, other))
        list(decode(Table(text), arbiter, text[:3], GREEDY, Streams(0), 900, planner=arbiter))
        counts = {"head": head.num_drafts, "mtp": mtp.num_drafts}
        assert counts[cheap] > 4 * counts[dear] > 0  # and the other is looked at now and then


def test_dear_drafts_lose_to_cheap_ones_that_bring_fewer_tokens_though_each_round_gains_less():
    """A round of four tokens at 3.5 plain steps gains more than one of two at 1.1, and brings fewer tokens a millisecond."""
    text = torch.randint(50, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    head, mtp = Head(text, True), TableModules(text, True)
    head.layer_ids, mtp.block_size = (), 1
    flat = tuple(1 + 0.01 * k for k in range(17))
    table, other = CostTable((0,), (Costs(2.5, flat),)), CostTable((0,), (Costs(0.1, flat),))
    arbiter = Arbiter(head, PromptLookup(50, 15), [0.5] * 4, 8.0, mtp).plan_with(table, mtp_table=DraftedBy(table, other))
    list(decode(Table(text), arbiter, text[:3], GREEDY, Streams(0), 1500, planner=arbiter))
    assert arbiter.head_planner.lately.value > arbiter.mtp_planner.lately.value
    assert mtp.num_drafts > 4 * head.num_drafts > 0


# The modules' first token, and the head from there on ---------------------------------------


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "dflash"])
@pytest.mark.parametrize("family", ["qwen3_5", "step3p7"])
def test_the_head_goes_on_from_the_modules_token(family, kind, targets):
    """The law of each later token is the head's after that first token, whoever drew it; and the text stays the target's."""
    target = targets(family)
    head = tiny_head(target, "vanilla" if kind == "dflash" else kind, 0 if kind == "dflash" else 8)
    law = make_law(1.1, top_k=9, repetition_penalty=1.2)
    seeded = committed(SeededDrafter(MtpDrafter(load_mtp(target), target), DSparkDrafter(head, target)), target, PROMPT)
    made = seeded.draft(PROMPT, 4, law, Streams(3).draft)
    first = committed(MtpDrafter(load_mtp(target), target), target, PROMPT).draft(PROMPT, 1, law, Streams(3).draft)
    assert made.tokens[0] == first.tokens[0] and torch.equal(made.probs_KV[0], first.probs_KV[0])
    assert len(made.tokens) == len(made.probs_KV) == len(made.confidences) == 4
    forced = Coupled(0)  # the head alone, made to draw the same tokens
    forced.choose = lambda q_C, position, size, ids_C=None: made.tokens[position - len(PROMPT)]
    alone = committed(DSparkDrafter(head, target), target, PROMPT).draft(PROMPT, 4, law, forced)
    assert alone.confidences == pytest.approx(made.confidences, abs=ROUNDING)
    assert (alone.probs_KV[0] - made.probs_KV[0]).abs().max() > 0.01
    for k in range(1, 4):
        assert (alone.probs_KV[k] - made.probs_KV[k]).abs().max() < ROUNDING
        assert abs(made.probs_KV[k].sum() - 1) < 1e-5 and made.probs_KV[k][made.tokens[k]] > 0
    result = generate(target, head, PROMPT, NUM_NEW, drafter=seeded, plan="fixed")
    assert result.token_ids == plain_greedy(target, PROMPT, NUM_NEW)
    assert generate(target, head, PROMPT[:1], 6, drafter=seeded, plan="auto").token_ids == plain_greedy(target, PROMPT[:1], 6)


def test_a_draft_that_its_first_token_ends_says_what_was_asked(targets):
    """Else plans would see what was drawn before they decide about it."""
    target = targets("step3p7")

    def none_after_one(ids, scores):
        return torch.full_like(scores, -float("inf")) if ids.shape[1] > len(PROMPT) else scores

    for temperature in (0.0, 1.0):
        law = make_law(temperature, logits_processors=[none_after_one])
        seeded = committed(SeededDrafter(MtpDrafter(load_mtp(target), target), DSparkDrafter(tiny_head(target), target)), target, PROMPT)
        draft = seeded.draft(PROMPT, 3, law, torch.Generator())
        assert (len(draft.tokens), len(draft.probs_KV), draft.num_asked) == (1, 1, 3)


# Forks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flushed", [2, 20, 36])
@pytest.mark.parametrize("size", [20, 30, 36])
@pytest.mark.parametrize(("family", "count"), [("deepseek_v3", 1), ("llama", 1), ("llama", 3), ("eagle3", 1)])
def test_a_forked_drafter_drafts_what_a_new_one_does(family, count, size, flushed, targets):
    """Texts that are alike in `size` tokens and as many more as there are modules; or the whole of the first one's."""
    target = targets(family) if family == "deepseek_v3" else Target(tiny_model("llama"))
    heads = {
        "deepseek_v3": load_mtp,
        "llama": lambda _: MtpHead(*with_target(target, count)),
        "eagle3": lambda _: tiny_recurrent(target, "eagle3"),
    }
    head = heads[family](target)
    ids = torch.randint(128, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    first = MtpDrafter(head, target, 4)
    features = target.prefill(target.start(), ids[:36])
    first.commit(features[:flushed])
    first.draft(ids[: flushed + 1], 1 if flushed == 20 else 4, GREEDY, torch.Generator())
    if flushed < 36:
        first.commit(features[flushed:])
    before = first.num_bytes
    alike = size if size == 36 else size + count
    other = [*ids[:alike], *ids[45:52]]
    assert first.can_fork(size)
    forked = first.fork(size)
    forked.commit(target.prefill(target.start(), other[:-1])[size:])
    fresh = committed(MtpDrafter(head, target, 4), target, other)
    for drafter, text in ((forked, other), (fresh, other)):
        drafter.made = drafted(drafter, text, 4)
    assert forked.made[0] == fresh.made[0]
    for k in range(4):
        assert (forked.made[1][k] - fresh.made[1][k]).abs().max() < ROUNDING
    assert first.num_bytes == before
    again = committed(MtpDrafter(head, target, 4), target, ids[:37])
    assert drafted(first, ids[:37], 4)[0] == drafted(again, ids[:37], 4)[0]  # the lender is as it was


def with_target(target: Target, count: int):
    modules, outputs = tiny_modules(target, count)
    return modules, target, outputs


def test_windows_are_not_cut(targets):
    target = targets("step3p7")
    drafter = committed(MtpDrafter(load_mtp(target), target, 4), target, PROMPT)
    assert drafter.can_fork(len(PROMPT) - 1) and not drafter.can_fork(len(PROMPT) - 3)
    with pytest.raises(AssertionError, match="sliding window"):
        drafter.fork(3)


def test_what_was_committed_does_not_keep_a_pass_alive(targets):
    target = targets("deepseek_v3")
    drafter = committed(MtpDrafter(load_mtp(target), target, 4), target, PROMPT)
    drafted(drafter, PROMPT, 4)
    assert drafter.num_bytes < 3 * (drafter.slot_bytes + target.hidden_size * 4) * (len(PROMPT) + 4)
    features = target.prefill(target.start(), PROMPT)
    for _ in range(1000):  # rounds of others
        drafter.commit(features[:2])
    assert len(drafter.pending) < 15 and sum(map(len, drafter.pending)) == 2000


# The engine -------------------------------------------------------------------------------


def engine_of(target: Target, mtp: MtpHead | None = None, head: bool = True, **options) -> Engine:
    own = tiny_head(target, head_dim=16, block_size=5) if head else None
    return Engine(target, own, **({"max_running": 4, "mtp": mtp or load_mtp(target), "plan": "fixed"} | options))


def drafters_of(steps) -> set[str]:
    return {done.drafter for step in steps for done in step.rounds if done.drafted}


@pytest.fixture
def at_random(monkeypatch):
    monkeypatch.setattr(AtRandom, "games", itertools.count())  # the same dice whatever ran before
    monkeypatch.setattr("dspark.engine.engine.Arbiter", AtRandom)


@pytest.fixture
def lucky(monkeypatch):
    """The engine's modules draft, and then say 0, 1, .. of the next tokens right: those of the text that is handed over here and begins so."""
    texts: list[list[int]] = []
    counts = itertools.count()

    class Lucky(Compared):
        def draft(self, ids, limit, law, noise):
            made = super().draft(ids, limit, law, noise)
            text = next((text for text in texts if text[: len(ids)] == list(ids)), [])
            tokens = text[len(ids) : len(ids) + len(made.tokens)]
            right = next(counts) % (len(tokens) + 1)
            tokens[right:] = [(token + 1) % self.target.vocab_size for token in tokens[right:]]
            return Draft(tokens, FewTokens.certain(tokens, self.target.vocab_size, "cpu"))

        def fork(self, num_tokens):
            forked = super().fork(num_tokens)
            forked.__class__ = Lucky
            return forked

    monkeypatch.setattr("dspark.engine.engine.MtpDrafter", Lucky)
    return texts


@pytest.mark.usefixtures("at_random")
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("family", WITH_MTP)
def test_every_answer_is_the_reference_loops(family, head, targets, lucky):
    target, steps = targets(family), []
    requests = [replace(request, max_new_tokens=min(request.max_new_tokens, 12)) for request in mixed_requests(9)]
    truths = [reference(target, request) for request in requests]
    lucky.extend([*request.prompt_ids, *truth] for request, truth in zip(requests, truths, strict=True))
    for index in sorted(range(1, 7), key=lambda i: len(truths[i]))[-3:]:  # all of these may be drafted
        requests[index] = replace(requests[index], predicted_ids=truths[index])
    ears = serve(engine_of(target, head=head, on_step=steps.append), requests, all_at_once=False)
    assert [ear.ids for ear in ears] == truths
    assert drafters_of(steps) >= {"mtp", "prediction"} | ({"dspark"} if head else set())
    assert any(done.accepted for step in steps for done in step.rounds if done.drafter == "mtp")


@pytest.mark.usefixtures("at_random")
def test_every_answer_is_the_reference_loops_natively():
    model = tiny_model("llama", **NATIVE_SHAPE)
    target, steps = Target(model, runtime=NativeRuntime(model)), []
    mtp = MtpHead(*with_target(target, 2))
    requests = mixed_requests(16)
    ears = serve(engine_of(target, mtp, on_step=steps.append), requests)
    assert [ear.ids for ear in ears] == [reference(target, request) for request in requests]
    assert drafters_of(steps) >= {"mtp", "lookup", "dspark"}
    assert any(ear.last.cached_tokens for ear in ears)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_5"])
def test_auto_plans_and_grammars_too(family, targets):
    target = targets(family)
    request = Request(PROMPT, 40, eos_ids=frozenset())
    truth = reference(target, request)
    forced = replace(request, propose=lambda ids: truth[len(ids) - len(PROMPT) :][: len(ids) % 3])
    for plan in ("auto", "online"):
        ears = serve(engine_of(target, plan=plan), [request, forced, replace(request, predicted_ids=truth)])
        assert [ear.ids for ear in ears] == [truth] * 3


@pytest.mark.usefixtures("at_random")
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_5", "step3p7"])
def test_little_memory_preempts_and_changes_nothing(family, targets):
    target = targets(family)
    requests = [Request([i, *range(30 + i, 50)], 30, eos_ids=frozenset()) for i in range(6)]
    tight = engine_of(target)
    tight.cache_bytes = int(1.1 * tight._most_bytes(51))
    released, held = [], []
    release = tight._release
    tight._release = lambda r: (released.append(r.number), release(r))
    tight.on_step = lambda step: held.append(tight.held_bytes)
    ears = serve(tight, requests)
    assert [ear.ids for ear in ears] == [reference(target, request) for request in requests]
    assert len(released) > len(requests)
    assert 0.5 * tight.cache_bytes < max(held) <= tight.cache_bytes


@pytest.mark.usefixtures("at_random")
@pytest.mark.parametrize(("family", "lost"), [("deepseek_v3", 1), ("qwen3_5", None), ("step3p7", None)])
def test_a_known_beginning_brings_the_modules_state(family, lost, targets, lucky, monkeypatch):
    """A cut one as many tokens less as there are modules; where states cannot be cut, whole texts only. Every draft is compared."""
    compared = []
    monkeypatch.setattr(Compared, "num_compared", property(lambda self: 0, lambda self, count: compared.append(self)))
    target = targets(family)
    engine = engine_of(target)

    def ask(prompt: list[int]) -> tuple[list[int], int]:
        request = Request(prompt, 20, eos_ids=frozenset())
        truth = reference(target, request)
        lucky.append([*prompt, *truth])
        (ear,) = serve(engine, [request])
        assert ear.ids == truth
        return ear.ids, ear.last.cached_tokens

    first = list(range(40))
    answer, cached = ask(first)
    assert cached == 0
    whole = [*first, *answer]
    assert ask([*first, 99, 98])[1] == (0 if lost is None else len(first) - lost)
    assert ask([*whole, 77, 78])[1] in {len(whole) - 1, len(whole) - 1 - (lost or 0)}
    assert len(compared) > 6


def test_modules_that_fail_cost_speed_only(targets, monkeypatch):
    target = targets("deepseek_v3")
    request = Request(PROMPT, 20, eos_ids=frozenset())
    steps = []
    engine = engine_of(target, head=False, on_step=steps.append)
    run, calls = MtpHead.run, []

    def fails(self, *arguments):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return run(self, *arguments)

    monkeypatch.setattr(MtpHead, "run", fails)
    assert engine.generate(request)[0] == reference(target, request)
    assert "mtp" in drafters_of(steps) and len(calls) == 5  # and nobody asks them again


def test_a_law_that_breaks_in_a_draft_leaves_the_modules_as_they_are(targets):
    target = targets("step3p7")
    drafter = committed(Compared(load_mtp(target), target, 4), target, PROMPT)

    def broken(ids, logits):
        raise ValueError

    with pytest.raises(ValueError):
        MtpDrafter.draft(drafter, PROMPT, 4, make_law(1.0, logits_processors=[broken]), torch.Generator())
    assert drafter.whole
    drafter.draft(PROMPT, 4, GREEDY, torch.Generator())
    assert drafter.num_compared == 1


# Where people ask for them ----------------------------------------------------------------


def test_auto_takes_modules_where_the_checkpoint_has_them(targets, folders):
    target = targets("qwen3_5")
    arbiter = make_drafter("auto", target, None)
    assert arbiter.head is None and arbiter.mtp.head is load_mtp(target)
    result = generate(target, None, PROMPT, NUM_NEW, drafter=arbiter, plan=make_planner("auto", target, arbiter))
    assert result.token_ids == plain_greedy(target, PROMPT, NUM_NEW)
    both = make_drafter("auto", target, tiny_head(target))
    assert len(both.models) == 2
    assert generate(target, both.head.head, PROMPT, NUM_NEW).token_ids == result.token_ids
    without = Target(tiny_model("llama"))
    assert own_mtp(without) is None and make_drafter("auto", without, tiny_head(without)).mtp is None
    with pytest.raises(SettingError, match="needs a head"):
        make_drafter("auto", without, None)


def test_a_grafted_model_drafts_with_its_own_modules(folders):
    model = AutoModelForCausalLM.from_pretrained(folders("qwen3_5"), dtype=torch.float32)
    prompt = torch.tensor([PROMPT])
    plain = model.generate(prompt, do_sample=False, max_new_tokens=NUM_NEW)
    dspark.graft(model, None, plan="fixed", drafter="mtp")
    drafter = model.generate.drafter
    assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=NUM_NEW), plain)
    assert drafter.num_committed > len(PROMPT) and isinstance(drafter, MtpDrafter)
    dspark.graft(model, None, drafter="auto")
    assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=NUM_NEW), plain)
    dspark.ungraft(model)
    with pytest.raises(SettingError, match="no head"):
        dspark.graft(model, None)


def test_an_engine_says_how_it_serves(targets):
    said = engine_of(targets("qwen3_5")).notes()
    assert said[0] == "drafting by round: the head, the target's multi-token-prediction modules (1), prompt lookup"
    assert "one after the other" in said[1] and "whole texts only" in said[2]
    model = tiny_model("llama", **NATIVE_SHAPE)
    target = Target(model, runtime=NativeRuntime(model))
    assert Engine(target, None, max_running=2).notes() == ["drafting by round: prompt lookup"]


def test_serving_takes_the_modules_where_there_are_some(tmp_path, capsys, monkeypatch):
    pytest.importorskip("uvicorn")
    folder = save_with_mtp(tmp_path / "target", "deepseek_v3", vocab_size=259)
    byte_tokenizer().save_pretrained(folder)
    served = []
    monkeypatch.setattr("dspark.server.run.serve", lambda app, *others: served.append(app) or app.state.close(0.0))
    for options, said in (
        ([], ["no head is known", "drafting by round: the target's multi-token-prediction modules (1), prompt lookup"]),
        (["--drafter", "mtp"], ["drafting by round: the target's multi-token-prediction modules (1), prompt lookup"]),
        (["--drafter", "lookup"], ["drafting by round: prompt lookup\n"]),
    ):
        assert main(["serve", str(folder), "--port", "0", "--dtype", "float32", "--cache-gb", "0.1", *options]) == 0
        err = capsys.readouterr().err
        assert all(text in err for text in said) and "plainly" not in err
    assert len(served) == 3
    tiny_model("llama", vocab_size=259).save_pretrained(tmp_path / "without")
    assert main(["serve", str(tmp_path / "without"), "--port", "0", "--drafter", "mtp"]) == 2
    assert "without has no multi-token-prediction modules" in capsys.readouterr().err


def test_commands_take_auto_without_a_head(tmp_path, capsys):
    folder = save_with_mtp(tmp_path / "target", "qwen3_5", vocab_size=259)
    byte_tokenizer().save_pretrained(folder)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n')
    assert main(["generate", str(folder), "hello", "--max-new-tokens", "12", "--drafter", "auto", "--json"]) == 0
    assert main(["generate", str(folder), "hello", "--max-new-tokens", "12", "--drafter", "none", "--json"]) == 0
    texts = [json.loads(line)["token_ids"] for line in capsys.readouterr().out.splitlines()]
    assert texts[0] == texts[1]
    assert main(["bench", str(folder), "--prompts", str(prompts), "--compare", "plain,auto,mtp", "--max-new-tokens", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["modes"]
    assert report["auto"]["identical_to_plain"] == report["mtp"]["identical_to_plain"] == 1


@pytest.mark.parametrize("family", ["qwen3_5", "deepseek_v3", "step3p7"])
def test_a_head_may_begin_as_the_first_module(family, targets):
    """Its context keys are those of the module's block where the embedding is left out, once the module's first norm has scaled them alike."""
    target = targets(family)
    config = tiny_head(target, head_dim=target.text_config.head_dim).config
    head, plain = (new_head(target, config, torch.arange(128), 0, way) for way in ("mtp", "last"))
    mtp, D = load_mtp(target), target.hidden_size
    module = mtp.model.layers[0]
    state = torch.randn(1, 3, D, generator=torch.Generator().manual_seed(0))
    read = module.hnorm(state if mtp.before_norm else mtp.norm(state))
    expected = module.eh_proj(torch.cat([torch.zeros_like(read), read], dim=-1))
    features = torch.stack([torch.zeros_like(state), state], dim=2)
    found = head.context(features)
    assert F.cosine_similarity(found, expected, dim=-1).min() > 0.999
    assert F.cosine_similarity(plain.context(features), expected, dim=-1).max() < 0.9
    if family != "deepseek_v3":  # whose latent attention has other projections
        normed = module.mtp_block.input_layernorm(expected)
        scaled = head.layers[0].input_layernorm(F.rms_norm(expected, (D,)))
        assert torch.allclose(scaled, normed, atol=1e-4)
        assert torch.equal(head.layers[0].mlp.up_proj.weight, module.mtp_block.mlp.up_proj.weight)


def test_a_head_cannot_begin_as_a_module_that_is_not_there():
    target = Target(tiny_model("llama"))
    with pytest.raises(HeadError, match="not loaded from a checkpoint"):
        new_head(target, tiny_head(target).config, torch.arange(128), 0, "mtp")


def test_train_takes_the_way_to_begin(targets, tmp_path, capsys):
    target = targets("qwen3_5")
    records = [{"prompt_ids": [1, 2], "answer_ids": [3, 4, 5]}]
    shape = {"num_hidden_layers": 1, "mask_token_id": 127}
    check_shape(target, shape | {"warm_start": "mtp"})
    begun, last = (begin_head(target, records, shape | way, 0) for way in ({"warm_start": "mtp"}, {}))
    block = load_mtp(target).model.layers[0].mtp_block
    assert torch.equal(begun.layers[0].mlp.up_proj.weight, block.mlp.up_proj.weight)
    assert torch.equal(last.layers[0].mlp.up_proj.weight, target.layers[-1].mlp.up_proj.weight)
    folder = save_tiny_target(tmp_path / "without")
    command = ["train", str(folder), "--out", str(tmp_path / "out"), "--warm-start", "mtp", "--num-prompts", "70"]
    for more, said in (([], "has no multi-token-prediction modules"), (["--kind", "eagle3"], "--warm-start cannot take effect")):
        assert main([*command, *more]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
