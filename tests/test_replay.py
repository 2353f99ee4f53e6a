"""Traces are read strictly; a replay of the recorded plan is the recording, and the default planner never loses."""

import json
import random

import pytest

from dspark.cli.main import main
from dspark.core.decode import Round
from dspark.core.planner import Costs, CostTable
from dspark.errors import SettingError, TraceError
from dspark.measure.fleet import Machines, as_curve, fleet_table, machines
from dspark.measure.replay import EXAMPLE_COSTS, StepCosts, between, make_step_planner, measured, read_costs, replay
from dspark.measure.trace import Drafted, Request, Trace, as_request, read_trace, write_trace

GAMMA = 5
MACHINE = CostTable((0, 500), (Costs(0.25, (1.0, 1.02, 1.04, 1.06, 1.1, 1.15)), Costs(0.3, (1.2, 1.25, 1.3, 1.35, 1.4, 1.5))))


def make_trace(chance: float, num_requests: int = 12, seed: int = 0) -> Trace:
    """Rounds whose confidences, spread around `chance`, are true."""
    rng, requests = random.Random(seed), []
    for prompt in range(num_requests):
        rounds: list[Drafted] = []
        while sum(r.num_accepted + 1 for r in rounds) < 100:
            confidences = tuple(rng.betavariate(4 * chance, 4 * (1 - chance)) for _ in range(GAMMA))
            rounds.append(Drafted(confidences, next((k for k, c in enumerate(confidences) if rng.random() >= c), GAMMA)))
        requests.append(Request(prompt, "ab"[prompt % 2], 40, 100, tuple(rounds)))
    return Trace(GAMMA, MACHINE, tuple(requests), {"machine": "none"})


def test_a_trace_is_read_as_it_was_written(tmp_path):
    rounds = [Round([1, 2, 3], 3, 3, 2, [0.9, 0.8, 0.1], uncalibrated=[0.7, 0.7, 0.2]), Round([4], 1, 1, 0, [0.5]), Round([5], 0, 0, 0)]
    request = as_request(0, "s", 7, rounds)
    assert request.num_tokens == 5 and request.rounds[2] == Drafted((), 0) and request.rounds[0].uncalibrated == (0.7, 0.7, 0.2)
    for trace in (make_trace(0.6), Trace(3, MACHINE, (request,), {})):
        write_trace(trace, tmp_path / "t.jsonl")
        assert read_trace(tmp_path / "t.jsonl") == trace


@pytest.mark.parametrize(
    ("line", "change", "says"),
    [
        (0, {"format": "other"}, "not a trace"),
        (0, {"block_size": 0}, "line 1: 0 where a whole number"),
        (0, {"costs": {"contexts": [1], "costs": []}}, "line 1: costs need"),
        (1, {"num_tokens": 10**6}, "line 2: 1000000 where"),
        (1, {"rounds": [{"confidences": [1.5], "num_accepted": 0}]}, "line 2: 1.5 where"),
        (2, {"rounds": [{"confidences": [0.5], "num_accepted": 2}], "num_tokens": 2}, "line 3: 2 where a whole number from 0 to 1"),
        (2, {"rounds": None}, "line 3: 'NoneType'"),
        (2, {"set": 3}, "line 3: set 3 is no text"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, change, says):
    file = tmp_path / "t.jsonl"
    write_trace(make_trace(0.5, 3), file)
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    lines[line] |= change
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(TraceError, match=says):
        read_trace(file)
    file.write_text(file.read_text()[:-9])
    with pytest.raises(TraceError, match="not JSON"):
        read_trace(file)


def test_replaying_the_recorded_plan_is_the_recording():
    trace = make_trace(0.6, 40)
    outcome, rounds = replay(trace, "fixed"), [r for request in trace.requests for r in request.rounds]
    assert outcome.num_steps == outcome.num_drafted == len(rounds) and outcome.num_tokens == 4000
    assert outcome.num_accepted == sum(r.num_accepted for r in rounds)
    lengths = [sum(r.num_accepted + 1 for r in request.rounds[:n]) for request in trace.requests for n in range(len(request.rounds))]
    expected = sum(MACHINE.at(40 + n).draft + MACHINE.at(40 + n).score(GAMMA) for n in lengths)
    assert outcome.milliseconds == pytest.approx(expected)


@pytest.mark.parametrize("plan", ["plain", "length:1", "length:3", "threshold:0.3"])
def test_other_plans_draw_rounds_without_favour(plan):
    """The first token's acceptance is that of all rounds, whatever the plan skips or cuts."""
    trace = make_trace(0.6, 300)
    figures = replay(trace, plan).figures()
    first = [r.num_accepted > 0 for request in trace.requests for r in request.rounds]
    if plan == "plain":
        assert figures["tau"] == 1 and figures["budget"] == 0 and figures["acceptance"] is None
    elif plan == "length:1":
        assert figures["tau"] == pytest.approx(1 + sum(first) / len(first), abs=0.02)
    else:
        assert 1.5 < figures["tau"] < replay(trace, "fixed").figures()["tau"]


COSTS = {
    "example": read_costs(EXAMPLE_COSTS)[1],
    "machine": measured(MACHINE)(0),
    "drafts that cost more than they bring": StepCosts(((1, 10.0), (4, 40.0)), ((1, 15.0),)),
    "steep": StepCosts(((1, 10.0), (2, 14.0), (9, 42.0)), ((1, 2.0),)),
    "stairs": StepCosts(tuple((n, 10.0 + 5.0 * ((n - 1) // 16)) for n in range(1, 200)), ((1, 1.0), (200, 1.0))),
}


@pytest.mark.parametrize("chance", [0.05, 0.5, 0.75])
@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("num_requests", [1, 16])
def test_the_default_planner_is_never_below_plain_or_fixed(chance, costs, num_requests):
    def rate(plan):
        return replay(make_trace(chance, 60), plan, num_requests, lambda num_tokens: COSTS[costs]).figures()["tokens_per_second"]

    # alone, a head that falls just short of paying costs more: a lucky probe is followed by another draft
    assert rate("auto") >= (0.985 if num_requests == 1 else 0.995) * max(rate("plain"), rate("fixed"))


def test_requests_that_parked_on_a_stair_find_out_that_it_pays():
    """One token more than the stair never pays, so Algorithm 1 verifies nothing and all park; then budgets reach past it."""
    plain, trapped, auto = (
        replay(make_trace(0.75, 60), plan, 16, lambda num_tokens: COSTS["stairs"]).figures() for plan in ("plain", "early-stop", "auto")
    )
    assert trapped["budget"] == 0 and trapped["tokens_per_second"] < plain["tokens_per_second"]
    assert auto["tokens_per_second"] > 1.1 * plain["tokens_per_second"]


def test_rows_that_cost_nothing_are_used():
    """A pass of 10 ms up to 200 rows holds every drafted token of 16 requests; yesterday's budgets are no reason to leave some out."""
    every, lagged = (replay(make_trace(0.5), plan, 16, lambda num_tokens: COSTS["example"]).figures() for plan in ("fixed", "lagged"))
    assert lagged == every | {"plan": "lagged"}


def test_nobody_drafts_where_even_perfect_drafts_would_lose():
    dear = replay(make_trace(0.75, 60), "auto", 16, lambda num_tokens: StepCosts(((1, 1.0),), ((1, 0.1),))).figures()
    assert dear["drafted"] == 0


def test_the_budget_falls_as_requests_share_a_step(monkeypatch):
    monkeypatch.setattr("dspark.measure.replay.PLACE_TOKENS", 200)
    budgets = [replay(make_trace(0.6), "lagged", n, lambda num_tokens: COSTS["example"]).figures()["budget"] for n in (1, 64, 256)]
    assert budgets[0] > 4.5 > budgets[1] > 1.5 > budgets[2]


def test_costs_are_linear_between_points_and_in_proportion_past_the_last():
    points = ((2, 10.0), (4, 20.0))
    assert [between(points, n) for n in (1, 2, 3, 4, 8)] == [10.0, 10.0, 15.0, 20.0, 40.0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "not JSON"),
        ("{}", "no 'about'"),
        ('{"about": "x", "rows": [[2, 1], [1, 1]], "drafts": [[1, 1]]}', "ascending"),
        ('{"about": "x", "rows": [[1, 0]], "drafts": [[1, 1]]}', "0 where a number"),
        ('{"about": "x", "rows": [], "drafts": [[1, 1]]}', "ascending"),
    ],
)
def test_bad_costs_are_named(tmp_path, text, says):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(TraceError, match=says):
        read_costs(tmp_path / "c.json")


def test_unknown_plans_are_refused():
    for name in ("magic", "length:-1", "threshold:2", "length:x"):
        with pytest.raises(SettingError, match="unknown plan"):
            make_step_planner(name, GAMMA, COSTS["example"], 1)


def test_a_length_that_was_never_drafted_is_refused():
    make_step_planner(f"length:{GAMMA}", GAMMA, COSTS["example"], 1)
    with pytest.raises(SettingError, match=f"than are ever drafted: at most {GAMMA} here"):
        make_step_planner(f"length:{GAMMA + 1}", GAMMA, COSTS["example"], 1)


def test_machines_for_a_load_are_what_the_steps_and_the_prompts_take():
    trace = make_trace(0.6)  # prompts of 40 tokens, answers of 100
    costs = StepCosts(((1, 10.0), (39, 10.0), (1000, 40.0)), ((1, 1.0),))
    at = lambda num_tokens: costs  # noqa: E731
    plain = replay(trace, "plain", 4, at)
    found = machines(trace, plain, at, load=10.0)
    # 100 tokens at 10 ms / 4 each, and 10 ms for the prompt
    assert found.answers_per_second == pytest.approx(1e3 / 260) and found.machines == 3
    assert found.pace == pytest.approx(100 * (1e3 / 260) / 4)
    assert machines(trace, plain, at, 10.0, least_pace=97.0).machines is None
    drafted = machines(trace, replay(trace, "fixed", 4, at), at, 10.0)
    assert drafted.answers_per_second > found.answers_per_second and drafted.machines == 2
    told = fleet_table([found, drafted], 10.0, 0.0)
    assert "10 answers/s without drafts: 3 machines (plain, 4" in told and "10 answers/s with drafts: 2 machines (fixed, 4" in told
    assert "no batch of these gives each request 97" in fleet_table([machines(trace, plain, at, 10.0, 97.0)], 10.0, 97.0)


def test_plans_that_come_to_the_same_are_all_named():
    alike = [Machines(plan, 4, 5.0, 20.0 + more, 2) for plan, more in (("fixed", 0.0), ("length:5", 0.01), ("auto", 1.0), ("lagged", 1.0))]
    others = [Machines("fixed", 1, 4.0, 30.0, 3), Machines("plain", 4, 4.0, 16.0, 3), Machines("fixed", 16, 6.0, 21.0, 2)]
    told = fleet_table([*alike, *others], 10.0, 0.0)
    assert "with drafts: 2 machines (auto = lagged, 4 requests at once; or fixed, 16 requests at once)" in told
    assert "without drafts: 3 machines (plain, 4 requests at once)" in told
    told = fleet_table(alike[:2], 10.0, 0.0)
    assert "2 machines (fixed = length:5, 4 requests at once)" in told
    assert "10 answers/s without drafts: plain decoding was not replayed (--plans)" in told
    assert "10 answers/s with drafts: no plan that drafts was replayed (--plans)" in fleet_table(others[1:2], 10.0, 0.0)


def test_costs_of_requests_together_become_points(tmp_path):
    together = {2: Costs(1.5, (12.0, 14.0, 15.0)), 4: Costs(2.0, (13.0, 18.0, 20.0))}
    curve = as_curve(Costs(1.0, (10.0, 11.0, 11.5)), together)
    # two rows: of one request with a draft, or of two; six and eight follow in order
    assert curve["rows"] == [[1, 10.0], [2, 11.5], [3, 11.5], [4, 13.5], [6, 15.0], [8, 18.0], [12, 20.0]]
    assert curve["drafts"] == [[1, 1.0], [2, 1.5], [4, 2.0]]
    (tmp_path / "c.json").write_text(json.dumps({"about": "here", **curve}))
    assert read_costs(tmp_path / "c.json")[1].step(6, 2) == 16.5


def test_a_load_that_is_none_is_refused(tmp_path, capsys):
    write_trace(make_trace(0.6, 3), tmp_path / "t.jsonl")
    for options, says in ((["--load", "0"], "--load is 0.0"), (["--pace", "3"], "--pace cannot take effect")):
        assert main(["replay", str(tmp_path / "t.jsonl"), *options]) == 2 and says in capsys.readouterr().err
    assert (
        main(["replay", str(tmp_path / "t.jsonl"), "--costs", "example", "--requests", "1,4", "--plans", "plain,auto", "--load", "50"]) == 0
    )
    assert "50 answers/s with drafts:" in capsys.readouterr().out
