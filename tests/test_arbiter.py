"""The arbiter takes the drafter that gains more, lets the other's state follow, and changes no token."""

import json
import math
from dataclasses import replace

import pytest
import torch

from dspark.core.decode import Scored, decode
from dspark.core.planner import Always, Costs, CostTable, DraftedBy, Mean, Seeded
from dspark.core.sampling import Law, Streams
from dspark.core.verifier import Draft, FewTokens
from dspark.drafters import Arbiter, DSparkDrafter, MtpDrafter, PromptLookup
from dspark.errors import SettingError
from dspark.generation import generate, make_drafter, make_law, make_planner, stream
from dspark.profiling import planning_costs, profile, stored_costs
from dspark.target.load import use_runtime
from dspark.target.target import Target
from tiny import NATIVE_SHAPE, tiny_head, tiny_model, tiny_recurrent

GREEDY = Law(greedy=True)
FREE = CostTable((0,), (Costs(0.2, tuple(1 + 0.01 * k for k in range(17))),))
DEAR = CostTable((0,), (Costs(0.2, tuple(1.0 + k for k in range(17))),))


class Table:
    """A target that repeats a text for ever."""

    vocab_size = 50

    def __init__(self, text):
        self.text = text

    def start(self):
        return []

    def prefill(self, state, tokens):
        state += tokens
        return torch.zeros(len(tokens), 1, 1)

    def score(self, state, tokens):
        state += tokens
        rows = range(len(state) - len(tokens) + 1, len(state) + 1)
        logits_TV = torch.nn.functional.one_hot(torch.tensor([self.text[i % len(self.text)] for i in rows]), self.vocab_size)
        return Scored(logits_TV.float(), torch.zeros(len(tokens), 1, 1))

    def rollback(self, state, num_rejected):
        del state[len(state) - num_rejected :]


class Head:
    """Proposes the true next tokens, or wrong ones, and notes what it was handed."""

    block_size = 4

    def tap(self):
        pass

    def __init__(self, text, right):
        self.text, self.right = text, right

    def start(self):
        self.num_committed = self.num_drafts = 0

    def commit(self, features_TMD):
        self.num_committed += len(features_TMD)

    def draft(self, ids, limit, law, generator):
        assert self.num_committed == len(ids) - 1
        self.num_drafts += 1
        tokens = [(self.text[(len(ids) + k) % len(self.text)] + (not self.right)) % 50 for k in range(min(limit, self.block_size))]
        return Draft(tokens, FewTokens.certain(tokens, 50, "cpu"))


def run(text, right, table, num_tokens):
    target, head = Table(text), Head(text, right)
    arbiter = Arbiter(head, PromptLookup(50, 15), [0.5] * 4, trust=8).plan_with(table)
    rounds = list(decode(target, arbiter, text[:3], GREEDY, Streams(0), num_tokens, planner=arbiter))
    new = [token for done in rounds for token in done.tokens]
    assert new == [text[(3 + i) % len(text)] for i in range(num_tokens)]
    return rounds, head


def test_lookup_takes_over_where_a_text_repeats_itself():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(50, (60,), generator=generator).tolist()
    first, head = run(text, True, FREE, 50)  # nothing to find: the head drafts
    assert head.num_drafts >= len(first) - 2
    both, head = run(text, True, FREE, 600)
    assert max(done.num_accepted for done in both) == 15 and head.num_drafts < len(both) / 2


def test_a_wrong_head_is_parked_and_lookup_goes_on():
    text = torch.randint(50, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    rounds, head = run(text, False, FREE, 1200)
    assert head.num_drafts < 30 and sum(len(done.tokens) for done in rounds[-20:]) > 200


def test_where_nothing_gains_nothing_is_drafted():
    text = torch.randint(50, (2000,), generator=torch.Generator().manual_seed(2)).tolist()
    rounds, head = run(text, False, DEAR, 1500)
    assert sum(done.num_planned == 0 for done in rounds) > 0.98 * len(rounds) and head.num_drafts < 30


def test_a_rule_of_the_users_decides_lengths():
    text = list(range(40))
    target, head = Table(text), Head(text, True)
    arbiter = Arbiter(head, PromptLookup(50, 15), [0.5] * 4, trust=8).plan_with(DEAR, Always(length=2))
    rounds = list(decode(target, arbiter, text[:3], GREEDY, Streams(0), 90, planner=arbiter))
    assert {done.num_planned for done in rounds[:-1]} == {2}


@pytest.mark.parametrize("runtime", ["eager", "native"])
@pytest.mark.parametrize("plan", ["auto", "online", "fixed", "length:3", "threshold:0.5", "early-stop", "lagged"])
@pytest.mark.parametrize("drafter", ["auto", "dspark", "lookup"])
def test_no_plan_changes_a_greedy_text(drafter, plan, runtime, tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    target = Target(tiny_model("llama", **NATIVE_SHAPE))
    use_runtime(target, runtime)
    head = tiny_head(target, head_dim=16)
    prompt = [5, 6, 7, 5, 6, 8, 5, 6]
    plain = generate(target, None, prompt, 60).token_ids
    chosen = make_drafter(drafter, target, head)
    planner = make_planner(plan, target, chosen)
    for _ in range(2):
        assert generate(target, head, prompt, 60, drafter=chosen, plan=planner).token_ids == plain


def test_a_seed_replays_under_the_default_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    target = Target(tiny_model("llama"))
    head = tiny_head(target)

    def sample(seed):
        return generate(target, head, [3, 4, 3, 4], 50, temperature=1.0, seed=seed, drafter="auto", plan="auto").token_ids

    assert sample(1) == sample(1) != sample(2)


def test_costs_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    target = Target(tiny_model("llama"))
    head = tiny_head(target)
    said = []
    table = planning_costs(target, head, 6, said.append)
    assert table.contexts == (249,) and len(table.costs[0].rows) == 6 and table.costs[0].draft > 0
    assert planning_costs(target, head, 6, said.append) == table and len(said) == 1
    (file,) = (tmp_path / "profiles").glob("*.json")
    whole = file.read_text()
    assert planning_costs(target, None, 6, said.append).costs[0].draft == 0 and len(said) == 2  # another drafter, another file
    for damaged in (
        "{",
        whole.replace('"draft"', '"raft"'),
        whole.replace(str(table.costs[0].rows[2]), "-1.0"),
        whole.replace(target.fingerprint()[3], "0"),
    ):
        file.write_text(damaged)
        planning_costs(target, head, 6, said.append)
    assert len(said) == 6
    assert json.loads(file.read_text())["depends_on"]["threads"] == torch.get_num_threads()
    kept = planning_costs(target, head, 6, said.append)
    assert planning_costs(target, head, 6, said.append, again=True) != kept and len(said) == 7
    monkeypatch.setenv("DSPARK_CACHE", "/proc/nowhere")  # a cache that cannot be written is measured anew, without a word more
    planning_costs(target, head, 6, said.append)
    assert len(said) == 8


@pytest.mark.parametrize(
    "damage",
    [
        {"each": None}, {"each": -0.1}, {"each": 5.1}, {"each": math.nan}, {"draft": math.inf}, {"draft": math.inf, "each": math.inf},
        {"rows": [1.0, math.nan]}, {"rows": [1.0, math.inf]}, {"contexts": [2048, 256]}, {"contexts": [256, 256]}, {"contexts": [math.inf, 1]},
        "[" * 10**5, "[]", {},
    ],
)  # fmt: skip
def test_senseless_costs_in_the_cache_are_as_none(damage, tmp_path):
    file, depends_on = tmp_path / "costs.json", {"rows": 2}
    changes = damage if isinstance(damage, dict) else {}
    costs = {"draft": 5.0, "rows": [1.0, 1.1], "each": 1.0} | {key: value for key, value in changes.items() if key != "contexts"}
    whole = {"depends_on": depends_on, "contexts": changes.get("contexts", [256, 2048]), "costs": [costs, costs]}
    file.write_text(damage if isinstance(damage, str) else json.dumps(whole))
    assert (stored_costs(file, depends_on) is None) == bool(damage)


def test_a_draft_is_measured_as_in_a_round(monkeypatch):
    """Behind one pass over a block, which a draft went before: many passes let its weights and code grow cold. And a plain pass behind another."""
    target = Target(tiny_model("llama"))
    head = tiny_head(target)
    clock, passes = [0.0], []
    real_score, real_draft = target.score, DSparkDrafter.draft

    def score(state, tokens, **options):
        clock[0] += 1e-3 if passes else 4e-3
        passes.append(len(tokens))
        return real_score(state, tokens, **options)

    def draft(drafter, *arguments):
        clock[0] += 2e-3 if passes == [head.config.block_size + 1] else 9e-3
        passes.clear()
        return real_draft(drafter, *arguments)

    monkeypatch.setattr(target, "score", score)
    monkeypatch.setattr(DSparkDrafter, "draft", draft)
    monkeypatch.setattr("dspark.profiling.time.perf_counter", lambda: clock[0])
    found = profile(target, head, 20, rows=(1, 2, 9), repeats=3, with_bandwidth=False)
    assert found.draft == pytest.approx(2) and found.rows == pytest.approx({1: 1, 2: 1, 9: 1})


def test_what_each_token_of_a_chain_costs_is_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    target = Target(tiny_model("llama"))
    head = tiny_recurrent(target, "eagle3", 5)
    clock, real_draft = [0.0], MtpDrafter.draft

    def draft(drafter, ids, limit, *more):
        clock[0] += 3e-3 + 2e-3 * limit
        return real_draft(drafter, ids, limit, *more)

    def score(state, tokens, real_score=target.score, **options):
        clock[0] += 10e-3
        return real_score(state, tokens, **options)

    monkeypatch.setattr(MtpDrafter, "draft", draft)
    monkeypatch.setattr(target, "score", score)
    monkeypatch.setattr("dspark.profiling.time.perf_counter", lambda: clock[0])
    found = profile(target, head, 20, rows=(1, 2, 9), repeats=3, with_bandwidth=False)
    assert (found.draft, found.draft_each) == (pytest.approx(13), pytest.approx(2))
    costs = planning_costs(target, head, 6).costs[0]
    assert (costs.draft, costs.each) == (pytest.approx(13), pytest.approx(2))
    assert planning_costs(target, head, 6).costs[0] == costs  # the kept ones
    drafts = DraftedBy(CostTable((0,), (Costs(4.0, (9.0, 9.0)),)), CostTable((0,), (costs,)))
    assert drafts.at(7) == Costs(costs.draft, (9.0, 9.0), costs.each)
    assert Seeded(drafts.table, drafts.drafts, 4).at(7) == Costs(
        pytest.approx(4 + 13 - 8), (9.0, 9.0)
    )  # its first token, and the other's whole draft


def test_an_arbiter_asks_a_chain_for_what_pays_only():
    target = Target(tiny_model("llama"))
    chain = MtpDrafter(tiny_recurrent(target, "eagle3", 5), target)
    lookup = PromptLookup(128, 15)
    lengths = []

    class Noted(Arbiter):
        def learn(self, num_drafted, num_planned, num_accepted):
            lengths.append((self.chosen is self.mtp_planner, num_drafted, num_planned))
            super().learn(num_drafted, num_planned, num_accepted)

    arbiter = Noted(None, lookup, [0.5], 8.0, chain)
    dear = CostTable((0,), (Costs(0.5, (1.0,) * 16, 0.1),))
    for table, longest in ((dear, 2), (CostTable((0,), (Costs(0.01, (1.0,) * 16, 0.001),)), 5)):
        lengths.clear()
        arbiter.plan_with(table)
        arbiter.mtp_planner.usual = [Mean(1 / 64, 0.35, 1e6) for _ in range(5)]  # known for sure
        list(decode(target, arbiter, [3, 17, 99, 45], GREEDY, Streams(0), 40, planner=arbiter))
        mine = [(drafted, planned) for chain_did, drafted, planned in lengths[:-5] if chain_did and drafted]
        assert mine and all(drafted == planned for drafted, planned in mine)
        assert {drafted for drafted, _ in mine} <= {longest, longest + 1}  # now and then one more
        assert sum(drafted == longest for drafted, _ in mine) >= len(mine) - 2


@pytest.mark.parametrize("plan", ["length:", "length:-1", "length:x", "threshold:2", "threshold", "always", "auto:3", ""])
def test_a_plan_without_meaning_is_refused(plan):
    target = Target(tiny_model("llama"))
    with pytest.raises(SettingError, match="plan"):
        make_planner(plan, target, make_drafter("dspark", target, tiny_head(target)))


def test_forgetting_forgets_everything():
    """A planner made anew decides as the first time: that is what lets a seed replay on a grafted model."""
    text = torch.randint(50, (30,), generator=torch.Generator().manual_seed(3)).tolist()
    arbiter = Arbiter(Head(text, True), PromptLookup(50, 15), [0.5] * 4, trust=8)

    def rounds():
        arbiter.plan_with(FREE)
        return list(decode(Table(text), arbiter, text[:3], GREEDY, Streams(0), 300, planner=arbiter))

    assert rounds() == rounds() == rounds()


def test_another_head_on_the_target_in_turns_does_not_disturb():
    target = Target(tiny_model("llama"))
    ours, other = tiny_head(target), tiny_head(target, seed=1)
    other.config = replace(other.config, target_layer_ids=(0,))
    prompt, law = [5, 6, 7, 5, 6, 8, 5, 6], make_law()
    alone = [done.tokens for done in stream(target, ours, prompt, max_new_tokens=40, law=law, drafter="auto", plan="fixed")]
    together = []
    for done in stream(target, ours, prompt, max_new_tokens=40, law=law, drafter="auto", plan="fixed"):
        together.append(done.tokens)
        target.tap(other.config.target_layer_ids)  # as another head's stream does
    assert together == alone
