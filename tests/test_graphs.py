"""CUDA graphs without a GPU: the static cache, the padded rows and the fall-back; what a capture does is played by a stand-in."""

import pytest
import torch

from dspark.drafters import PromptLookup
from dspark.errors import RuntimeUnavailable
from dspark.generation import generate
from dspark.target import graphs as module
from dspark.target.graphs import Graphs, Slot
from dspark.target.load import load_target
from dspark.target.target import Target
from saved import save_tiny_target
from tiny import tiny_head, tiny_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


class Replayed:
    """Stands for a captured graph: it runs again what was captured, and its results lie where they lay before."""

    def __init__(self, run):
        self.run, self.results = run, run()

    def replay(self):
        for place, fresh in zip(self.results, self.run(), strict=True):
            place.copy_(fresh)


@pytest.fixture(params=["unrecorded", "recorded"])
def record(request, monkeypatch):
    """How passes run: as they are, or through the stand-in."""

    def recording(run):
        graph = Replayed(run)
        return graph, graph.results

    monkeypatch.setattr(module, "recording", recording)
    monkeypatch.setattr(module, "FIRST_LENGTH", 16)  # so that texts outgrow it
    return request.param == "recorded"


def pair(family: str, record: bool) -> tuple[Target, Target]:
    """The same model eagerly, and through static passes."""
    model = tiny_model(family)
    graphs = Graphs(model, record=False)
    graphs.record = record
    return Target(model, name="tiny"), Target(model, name="tiny", graphs=graphs)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_and_features_are_the_eager_ones_however_rows_are_cut(family, record):
    eager, static = pair(family, record)
    for target in (eager, static):
        target.tap((0, 3))
    ids = torch.randint(128, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = eager.score(eager.start(), ids)
    for sizes in ([90], [1] * 5 + [3, 7, 40, 2, 16, 17], [33, 1, 31, 25]):
        state, done, parts = static.start(), 0, []
        for size in sizes:
            parts.append(static.score(state, ids[done : done + size]))
            static.rollback(state, 0)
            done += size
        assert isinstance(state.cache, Slot) and state.num_tokens == 90
        for name in ("logits_TV", "features_TMD"):
            found = torch.cat([getattr(part, name) for part in parts])
            wanted = getattr(expected, name)
            assert (found - wanted).abs().max() < 3e-5 * wanted.abs().max(), name  # rounding: other kernels, since there is a mask
        del state


def test_rejected_and_padding_rows_leave_nothing_behind(record):
    _, static = pair("llama", record)
    one, other = [], []
    for wrong, found in (([], one), ([7, 7, 7, 7], other)):
        state = static.start()
        static.prefill(state, PROMPT)
        for token in (5, 8, 13):
            scored = static.score(state, [token, *wrong])
            static.rollback(state, len(wrong))
            found.append(scored.logits_TV[0])
        del state
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_those_of_eager_decoding_with_and_without_drafts(temperature, record):
    eager, static = pair("llama", record)
    head = tiny_head(eager)
    plain = generate(eager, None, PROMPT, 48, temperature).token_ids
    assert generate(static, None, PROMPT, 48, temperature).token_ids == plain
    for drafter in ("dspark", PromptLookup(eager.vocab_size)):
        expected = generate(eager, head, PROMPT, 48, temperature, drafter=drafter, plan="fixed")
        found = generate(static, head, PROMPT, 48, temperature, drafter=drafter, plan="fixed")
        assert found.token_ids == expected.token_ids
        assert temperature > 0 or found.token_ids == plain
    if record:
        assert {size for size, _ in static.graphs.recorded} >= {1, 8}


def test_one_request_has_the_static_cache_and_forks_are_eager(record):
    eager, static = pair("llama", record)
    first = static.start()
    static.prefill(first, PROMPT)
    second = static.start()
    assert isinstance(first.cache, Slot) and not isinstance(second.cache, Slot)
    forked = static.fork(first, 6)
    assert forked is not None and not isinstance(forked.cache, Slot) and first.num_bytes > 0
    expected = eager.score(eager.start(), [*PROMPT[:6], 9]).logits_TV[-1:]
    assert torch.allclose(static.score(forked, [9]).logits_TV, expected, atol=2e-5)
    static.prefill(second, PROMPT)
    pieces = static.score_many([(first, [9, 2], 2), (second, [9, 2], 2)])
    assert torch.allclose(pieces[0].logits_TV, pieces[1].logits_TV, atol=2e-5)
    del first
    assert isinstance(static.start().cache, Slot)


def test_a_capture_that_fails_is_said_once_and_the_text_is_the_same(monkeypatch):
    eager, static = pair("llama", True)

    def fail(run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(module, "recording", fail)
    with pytest.warns(UserWarning, match="without CUDA graphs: recording failed: operation not permitted when stream is capturing$"):
        found = generate(static, None, PROMPT, 12).token_ids
    assert found == generate(eager, None, PROMPT, 12).token_ids and not static.graphs.record


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("gemma3", {}, "Gemma3ForCausalLM is not one of"),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}, "a sliding window"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary positions of the kind dynamic"),
    ],
)
def test_models_that_cannot_be_recorded_are_refused(family, overrides, reason):
    with pytest.raises(RuntimeUnavailable, match=reason):
        Graphs(tiny_model(family, **overrides), record=False)


def test_without_a_gpu_it_is_refused_when_asked_for(tmp_path):
    with pytest.raises(RuntimeUnavailable, match="CUDA graphs cannot run this model: the model is on cpu"):
        load_target(save_tiny_target(tmp_path), runtime="graph")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("error:decoding without CUDA graphs")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gpu_replays_what_it_computes(family, monkeypatch):
    monkeypatch.setattr(module, "FIRST_LENGTH", 16)
    model = tiny_model(family).to("cuda")
    eager, static = Target(model, name="tiny"), Target(model, name="tiny", graphs=Graphs(model))
    head = tiny_head(eager).to("cuda")
    plain = generate(eager, None, PROMPT, 48).token_ids
    for drafter in ("none", "dspark"):
        assert generate(static, head, PROMPT, 48, drafter=drafter, plan="fixed").token_ids == plain
    assert static.graphs.recorded
