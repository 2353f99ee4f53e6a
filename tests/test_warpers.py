"""Top-p without a sort keeps what transformers' top-p keeps, bit for bit, and sorts only where it must."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import dspark.warpers
from dspark.core.sampling import probs
from dspark.generation import make_law, split_law
from dspark.warpers import UnsortedTopP

VOCAB = 5000
TOP_PS = (1e-7, 0.1, 0.5, 0.9, 0.99, 0.99999, 1 - 1e-7, 1.0)


class Counted(UnsortedTopP):
    """Notes how many rows each sort had."""

    def sorted(self, logits_RV):
        self.sorts = [*getattr(self, "sorts", []), len(logits_RV)]
        return super().sorted(logits_RV)


def same(top_p: float, logits_TV: torch.Tensor, **options) -> list[int]:
    """Asserts that both classes give the same bits; how many rows each sort had."""
    before, warper = logits_TV.clone(), Counted(top_p, **options)
    found, expected = warper(None, logits_TV), TopPLogitsWarper(top_p, **options)(None, logits_TV)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(logits_TV, before, rtol=0, atol=0, equal_nan=True)
    return getattr(warper, "sorts", [])


def peaked(num_rows: int, size: int, seed: int = 0) -> torch.Tensor:
    """Rows as a language model's: few good tokens, and a body far below."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, size, generator=random)
    logits[:, 7:57] += torch.linspace(6, 13, 50)
    return logits


def kinds(size: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(size)
    normal = torch.randn(2, size, generator=random)
    masked = peaked(2, size)
    masked[:, torch.rand(size, generator=random) < 0.97] = -math.inf
    single = torch.full((2, size), -math.inf)
    single[0, 3], single[1, -1] = -4.0, 0.0
    return {
        "peaked": peaked(3, size), "flat": 1e-3 * normal, "between": normal, "wide": 6 * normal, "tied": (4 * normal).round(),
        "bfloat16": (4 * normal).bfloat16().float(), "equal": torch.full((2, size), 2.5), "masked": masked, "single": single,
        "nothing": torch.full((1, size), -math.inf), "broken": torch.where(normal > 3, math.nan, normal), "far": normal * 1e6,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", list(kinds(64)))
def test_the_tokens_kept_are_those_of_transformers(kind, dtype):
    logits = kinds(VOCAB)[kind].to(dtype)
    for top_p in TOP_PS:
        same(top_p, logits)


@pytest.mark.parametrize("kind", ["peaked", "between", "tied"])
@pytest.mark.parametrize("size", [49_152, 151_936])
def test_large_vocabularies(kind, size):
    same(0.9, kinds(size)[kind])


@given(
    st.integers(1, 3), st.integers(2, 60), st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 2**32), st.floats(0.0, 1.0),
    st.sampled_from([torch.float32, torch.float64]), st.floats(0.0, 1.0),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_row(num_rows, size, step, seed, top_p, dtype, masked):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, size, generator=random, dtype=dtype) * 2.5
    logits = (logits / step).round() * step if step else logits
    logits[torch.rand(logits.shape, generator=random) < masked] = -math.inf
    with patch.multiple(dspark.warpers, SMALL=0, LOOKS=(3, 11)):
        same(top_p, logits)


@pytest.mark.parametrize("options", [{"filter_value": -1e4}, {"min_tokens_to_keep": 3}])
def test_other_settings_are_left_to_transformers(options):
    assert same(0.3, peaked(2, VOCAB), **options) == [2]


def test_half_precision_is_left_to_transformers():
    assert same(0.9, peaked(2, VOCAB).bfloat16()) == [2]


def test_ordinary_rows_are_not_sorted():
    for top_p in (0.3, 0.5, 0.9, 0.95):
        assert same(top_p, peaked(8, 49_152)) == []
    hundreds = torch.full((1, VOCAB), -20.0)
    hundreds[0, ::10] = torch.linspace(0, 2, 500)
    assert same(0.9, hundreds) == []


def test_a_tie_at_the_border_is_sorted_and_elsewhere_not():
    # shares of about 1/2, 1/4, 1/16 four times: two of the four are kept at 0.85, all at 0.95, none at 0.7
    logits = torch.full((3, VOCAB), -30.0) + 1e-3 * torch.arange(VOCAB)
    logits[:, 100:106] = torch.tensor([1 / 2, 1 / 4, 1 / 16, 1 / 16, 1 / 16, 1 / 16]).log()
    logits[0, 102:106] += torch.tensor([0.02, 0.01, -0.01, -0.02])
    logits[2] = peaked(1, VOCAB)[0]
    assert same(0.85, logits) == [1]
    assert same(0.95, logits) == []
    assert same(0.7, logits) == []


def test_a_sum_at_the_border_is_sorted():
    logits = torch.full((2, VOCAB), -math.inf)
    logits[:, :5] = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16]).log()
    logits[1] = peaked(1, VOCAB)[0]
    assert same(0.75, logits) == [1]
    assert same(0.75 + 1e-6, logits) == [1]
    assert same(0.75 + 1e-4, logits) == []
    assert same(0.75 - 1e-4, logits) == []


LARGE = [pytest.param(size, marks=pytest.mark.slow) for size in (49_152, 151_936)]


@pytest.mark.parametrize("size", [5, VOCAB, *LARGE])
def test_a_border_at_the_very_sums_of_transformers(size):
    """At its sum of each rank's tokens and all worse ones, and by the least that floats can be beside it."""
    random = torch.Generator().manual_seed(1)
    normal = torch.randn(5, size, generator=random)
    rows = torch.stack(
        [normal[0], 6 * normal[1], (4 * normal[2]).round(), normal[3].bfloat16().float(), peaked(1, size)[0] if size > 57 else normal[4]]
    )
    sums = rows.sort().values.softmax(-1).cumsum(-1)
    looked = 0
    for rank in (rank for rank in (0, 1, 2, 7, 63, 64, 300, 512) if rank < size):
        for row, tail in zip(rows, sums[:, -1 - rank].tolist(), strict=True):
            for off in (0, 2**-24, -(2**-24), 2**-17, -(2**-17), 2**-10):
                if 0 <= (top_p := 1 - tail * (1 + off)) <= 1:
                    looked += not same(top_p, row[None])
    assert looked > 5 or size <= dspark.warpers.SMALL


ODD = {
    "zeros of both signs": lambda size: torch.where(torch.arange(size) % 2 == 0, 0.0, -0.0)[None].clone(),
    "all on one": lambda size: torch.full((1, size), -200.0).index_fill(1, torch.tensor([size // 2]), 0.0),
    "all but none on one": lambda size: torch.full((1, size), -16.0).index_fill(1, torch.tensor([size // 2]), 0.0),
    "infinite": lambda size: torch.randn(1, size).index_fill(1, torch.tensor([size // 2]), math.inf),
    "lowest": lambda size: torch.full((1, size), torch.finfo(torch.float32).min).index_fill(1, torch.tensor([0, size // 2]), 1.0),
    "two heights": lambda size: torch.where(torch.arange(size) % 7 == 0, 3.0, 0.0)[None].clone(),
    "one finite": lambda size: torch.full((1, size), -math.inf).index_fill(1, torch.tensor([size - 1]), 5.0),
    "equal": lambda size: torch.zeros(2, size),
}


@pytest.mark.parametrize("size", [1, 5, VOCAB, *LARGE])
@pytest.mark.parametrize("kind", ODD)
def test_odd_rows(kind, size):
    logits = ODD[kind](size)
    for top_p in (1e-6, 0.5, 0.9, 1 - 1e-7):
        for more in (logits, torch.cat([logits, torch.arange(size)[None] / size])):
            same(top_p, more)
            same(top_p, more.bfloat16(), min_tokens_to_keep=2)


@pytest.mark.parametrize("size", [VOCAB, *LARGE])
@pytest.mark.parametrize("kind", ["peaked", "between", "tied", "bfloat16", "equal", "masked"])
def test_among_other_warpers(kind, size):
    logits = kinds(size)[kind]
    for k, p, least in ((1, 0.5, 0.1), (50, 0.95, 0.02), (64, 0.9, 1e-3), (600, 0.99, 1e-6), (size - 1, 1 - 1e-6, 0.0)):
        for before, behind in (([TopKLogitsWarper(k)], [MinPLogitsWarper(least)]), ([TopKLogitsWarper(k), MinPLogitsWarper(least)], [])):
            warpers = [TemperatureLogitsWarper(0.7), *before, TopPLogitsWarper(p), *behind]
            assert torch.equal(
                probs(split_law(warpers, greedy=False), [()] * len(logits), logits), LogitsProcessorList(warpers)(None, logits).softmax(-1)
            )


def test_float32_sums_of_many_equal_numbers_do_not_mislead():
    """The sum of the softmax is off by hundreds of units here, so near the border only the sort knows."""
    logits = torch.full((1, 151_936), -1.2)
    logits[0, :50] = torch.linspace(0, 9, 50)
    tails = logits.double().sort().values.softmax(-1).cumsum(-1)[0, -20:-1:6]
    misled = 0
    for tail in tails.tolist():
        for units in (-1500, -500, 0, 500, 1500):
            top_p = 1 - tail * (1 + units * 2**-24)
            same(top_p, logits)
            kept = TopPLogitsWarper(top_p)(None, logits).isfinite().sum()
            misled += kept != TopPLogitsWarper(top_p)(None, logits.double()).isfinite().sum()
    assert misled  # else these rows test nothing


def test_rows_go_their_own_way_in_a_batch():
    rows = [*kinds(VOCAB)["tied"], *peaked(2, VOCAB), *kinds(VOCAB)["flat"], *kinds(VOCAB)["between"]]
    together = UnsortedTopP(0.9)(None, torch.stack(rows))
    for row, found in zip(rows, together, strict=True):
        assert torch.equal(found, UnsortedTopP(0.9)(None, row[None])[0])
    assert sum(same(0.9, torch.stack(rows))) < len(rows)


def test_laws_have_it_wherever_transformers_has_its_own():
    class Own(TopPLogitsWarper):
        pass

    own, hidden = Own(0.6), lambda ids, logits: logits
    theirs = LogitsProcessorList([TopPLogitsWarper(0.8, min_tokens_to_keep=2), hidden, TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9)])
    law = split_law(theirs, greedy=False)
    first, last = law.processors[0], law.warpers[-1]
    assert (type(first), first.top_p, first.min_tokens_to_keep) == (UnsortedTopP, 0.8, 2)
    assert (type(last), last.top_p, last.min_tokens_to_keep) == (UnsortedTopP, 0.9, 1)
    assert law.processors[1] is hidden and isinstance(last, TopPLogitsWarper)
    assert split_law([own], greedy=False).processors == (own,)
    logits = peaked(3, VOCAB, seed=3)
    expected = TopPLogitsWarper(0.9)(None, logits / 0.7).softmax(-1)
    assert torch.equal(probs(make_law(0.7, top_p=0.9), [()] * 3, logits), expected)
