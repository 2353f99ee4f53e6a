"""The report of a bench run: its numbers, and a page that needs nothing but itself."""

import builtins
import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from dspark.errors import SettingError
from dspark.measure.bench import Mode, turns
from dspark.measure.plots import PLOTS, draw, need_matplotlib, speed
from dspark.measure.report import figures, reliability, reliability_of, write_report
from test_replay import make_trace


def summary(tau: float, ratio: float, positions: list) -> dict:
    return {"tau": tau, "acceptance_by_position": positions, "ratio_to_plain": {"median": ratio, "quartiles": [0.9 * ratio, 1.1 * ratio]}}


@pytest.fixture(scope="module")
def data():
    """Sets whose names must not be taken for markup or mathematics."""
    replaced = pytest.MonkeyPatch()
    replaced.setattr("dspark.measure.replay.PLACE_TOKENS", 1)
    replaced.setattr("dspark.measure.report.CONCURRENCY", (1, 4))
    modes = {
        mode: summary(tau, ratio, positions) | {"sets": {name: summary(tau, ratio, positions) for name in ("a", "b")}}
        for mode, tau, ratio, positions in [("plain", 1.0, 1.0, []), ("dspark", 2.0, 1.25, [0.6, 0.5, None]), ("<b>$x^2$", 1.5, 0.8, [0.7])]
    }
    machine = {"processor": "a <chip>", "threads": 1, "torch": "2", "transformers": "5"}
    arguments = {"target": "t&u", "dtype": "float32", "temperature": 0.0, "max_new_tokens": 9}
    heads = {"dspark": {"layers": 2, "block_size": 5, "rank": 8}, "<b>$x^2$": {"layers": 1, "block_size": 5, "rank": 0}}
    yield figures(modes, make_trace(0.6), {"machine": machine, "arguments": arguments}, heads)
    replaced.undo()


def test_the_numbers_are_those_of_the_run_and_of_replays(data):
    assert data["speed"]["dspark"]["a"]["saved"]["median"] == pytest.approx(0.2)
    assert data["speed"]["<b>$x^2$"]["all"]["saved"]["median"] == pytest.approx(-0.25)
    assert "plain" not in data["acceptance"] and data["acceptance"]["dspark"] == [0.6, 0.5, None]
    for points in data["thresholds"].values():
        assert [p["cut"] for p in points] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
        assert points[0]["tau"] > points[5]["tau"] and points[0]["acceptance"] < points[5]["acceptance"]
    trace = make_trace(0.6)
    rounds = [r for request in trace.requests for r in request.rounds]
    assert data["thresholds"]["all"][0]["acceptance"] == pytest.approx(sum(r.num_accepted for r in rounds) / 5 / len(rounds), abs=1e-3)
    for found in data["concurrency"].values():
        assert {(f["plan"], f["requests"]) for f in found} >= {("plain", 1), ("auto", 4)}


def test_lengths_are_replays_and_heads_are_told_by_their_shapes(data):
    points = data["lengths"]["all"]
    assert [p["length"] for p in points] == [1, 2, 3, 4, 5] and all(a["tau"] < b["tau"] for a, b in pairwise(points))
    assert points[-1]["tau"] == data["thresholds"]["all"][0]["tau"]
    assert data["heads"]["<b>$x^2$"] == {"layers": 1, "block_size": 5, "rank": 0, "tau": 1.5}


def test_reliability_tells_what_calibration_did():
    """Confidences of which every token got half: survival is underestimated before, and true after."""
    trace = make_trace(0.6, 100)
    halved = [
        replace(request, rounds=tuple(replace(r, uncalibrated=tuple(c / 2 for c in r.confidences)) for r in request.rounds))
        for request in trace.requests
    ]
    found = reliability_of(replace(trace, requests=tuple(halved)), 1)
    assert found["ece"] < 0.05 and found["before"]["ece"] > 0.2 and "before" not in reliability_of(trace, 1)


def test_reliability_bins():
    assert reliability([0.05, 0.05, 0.32, 1.0], [True, False, True, True]) == [
        {"estimate": 0.05, "frequency": 0.5, "rounds": 2},
        {"estimate": 0.32, "frequency": 1.0, "rounds": 1},
        {"estimate": 1.0, "frequency": 1.0, "rounds": 1},
    ]
    for k, found in enumerate(reliability_of(make_trace(0.6, 100), k) for k in range(3)):
        assert found["position"] == k + 1 and sum(b["rounds"] for b in found["bins"]) == found["rounds"]
        for b in found["bins"]:  # the trace's confidences are true: four deviations
            assert b["frequency"] == pytest.approx(b["estimate"], abs=4 * (b["estimate"] * (1 - b["estimate"]) / b["rounds"]) ** 0.5 + 0.02)


def test_the_page_holds_every_plot_and_needs_nothing_else(data, tmp_path):
    write_report(data, "a table <of> figures", tmp_path / "new" / "folder")
    page = (tmp_path / "new" / "folder" / "index.html").read_text()
    assert json.loads((tmp_path / "new" / "folder" / "report.json").read_text()) == json.loads(json.dumps(data))
    assert page.count("<svg") == len(PLOTS) == page.count("</svg>")
    assert "prefers-color-scheme:dark" in page and "var(--ink)" in page and "var(--s1)" in page
    colours = set(re.findall(r"(?:fill|stroke): (#\w+)", page))
    assert not colours, "drawn in colours that do not follow the page"
    assert not re.search(r"""(src|href)=["'](?!#)|url\((?!#)|@import""", page)
    assert "&lt;b&gt;$x^2$" in page and "<b>" not in page and "t&amp;u" in page and "&lt;of&gt;" in page
    for label in ("tau (tokens a round)", "speed (times plain)", "time saved (% of plain)", "requests that share a step"):
        assert label in page


def test_a_report_that_cannot_be_written_says_so(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="cannot write the report"):
        write_report(data, "", tmp_path / "file")


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **more):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingError, match="pip install 'dspark\\[report\\]'"):
        need_matplotlib()


def test_every_mode_of_a_bench_follows_every_other_one():
    """The mode behind one that leaves a cold memory would be slower, if it always were the same one."""
    modes = [Mode(name) for name in ("plain", "dspark", "auto", "lookup")]
    orders = [turns(modes, index, 0) for index in range(48)]
    assert all(sorted(order, key=modes.index) == modes for order in orders) and orders == [turns(modes, index, 0) for index in range(48)]
    followed = [(before.name, after.name) for order in orders for before, after in pairwise(order)]
    assert {(a.name, b.name) for a in modes for b in modes if a != b} == set(followed)


def test_an_eighth_mode_looks_like_no_other(data):
    speeds = next(iter(data["speed"].values()))
    seven, eight = (draw(speed, data | {"speed": {f"mode {n}": speeds for n in range(count)}}, "bars") for count in (7, 8))
    assert "<pattern" not in seven and "<pattern" in eight and not re.search(r"(?:fill|stroke): #\w+", eight)
