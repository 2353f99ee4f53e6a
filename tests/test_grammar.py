"""Grammars: the masked law is kept exactly, whatever drafts; masks depend on the text alone."""

import json
import random
import re
from functools import cache
from itertools import product

import pytest
import torch

import dspark
from dspark.core.decode import Scored, judge_by_law, judge_coupled, judge_fast
from dspark.core.sampling import Coupled, Law, Streams, probs
from dspark.core.verifier import Draft, FewTokens
from dspark.engine import grammar as module
from dspark.engine.grammar import Grammar, Matcher
from dspark.errors import LogitsError, SettingError
from dspark.generation import generate, make_law, stream
from dspark.target import demo
from dspark.target.target import Target
from masked import answers_together, masked_case, wide_target
from test_law import DRAFTS, LAWS, PLANS, PROMPT, Case, bias, one_hot
from tiny import tiny_head
from words import word_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
# Each has an end in sight, so that also a random model comes to it.
SCHEMAS = {
    "person": PERSON,
    "choice": {"enum": ["yes", "no", 3, None, {"deep": [True]}]},
    "either": {"anyOf": [{"type": "boolean"}, {"type": "object", "properties": {"x": {"type": "number"}}, "additionalProperties": False}]},
    "pattern": {"type": "array", "prefixItems": [{"type": "string", "pattern": "^[a-f]{2,4}$"}], "items": False, "minItems": 1},
    "reference": {
        "$defs": {"leaf": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}},
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}},
        "required": ["left", "right"],
        "additionalProperties": False,
    },
}


def fits(value, schema) -> bool:
    """Whether a value satisfies one of `SCHEMAS`, said without llguidance."""
    names = {
        "person": lambda v: (
            list(v) == ["name", "age", "tags"]
            and len(v["name"]) <= 12
            and type(v["age"]) is int
            and 0 <= v["age"] <= 150
            and len(v["tags"]) <= 3
            and set(v["tags"]) <= {"red", "green", "blue"}
        ),
        "choice": lambda v: v in ["yes", "no", 3, None, {"deep": [True]}],
        "either": lambda v: v in (True, False) or (set(v) <= {"x"} and all(isinstance(x, int | float) for x in v.values())),
        "pattern": lambda v: len(v) == 1 and bool(re.fullmatch("[a-f]{2,4}", v[0])),
        "reference": lambda v: (
            list(v) == ["left", "right"] and all(set(leaf) == {"on"} and leaf["on"] in (True, False) for leaf in v.values())
        ),
    }
    return names[schema](value)


# The law ---------------------------------------------------------------------------------

# a 0, b 1, c 2, ab 3, the end 4: as many tokens as the cases of test_law.py have
REGEX, TEXTS, END = "(ab|c)+", ("a", "b", "c", "ab"), 4


@cache
def five_tokens():
    return word_tokenizer(alphabet="abc", words=["ab"], special=["$"])


def regex_matcher(num_prompt: int = len(PROMPT)) -> Matcher:
    return Grammar.from_regex(five_tokens(), REGEX, end_ids=[END]).matcher(num_prompt)


def may_follow(answer: tuple[int, ...]) -> list[int]:
    """The tokens that the grammar allows after an answer, by Python's own regular expressions."""
    if END in answer:
        text = "".join(TEXTS[t] for t in answer[: answer.index(END)])
        return [END] if set(answer[answer.index(END) :]) == {END} and re.fullmatch(REGEX, text) else []
    text = "".join(TEXTS[t] for t in answer)
    more = [t for t in range(4) if re.fullmatch("(ab|c)*a?", text) and re.fullmatch("(ab|c)*a?", text + TEXTS[t])]
    return more + ([END] if re.fullmatch(REGEX, text) else [])


def test_masks_are_those_of_the_regular_expression():
    matcher = regex_matcher()
    answers = [answer for size in range(5) for answer in product(range(5), repeat=size)]
    random.Random(0).shuffle(answers)  # in any order
    for answer in answers:
        masked = matcher.processor(torch.tensor([PROMPT + answer]), torch.zeros(1, 5))
        assert torch.isfinite(masked[0]).nonzero()[:, 0].tolist() == may_follow(answer), answer


def regex_case(law: Law, draft: str) -> Case:
    return masked_case(regex_matcher(), law, draft, lambda answer: bool(may_follow(answer)), spread=2.0)


@pytest.mark.parametrize("draft", [*DRAFTS, "forced"])
@pytest.mark.parametrize("law", ["greedy", "T=1", "top-k", "all warpers", "repetition"])
def test_a_masked_round_has_the_masked_law_of_the_target(law, draft):
    case = regex_case(LAWS[law], draft)
    for block_size, plan in product((1, 2, 3), PLANS.values()):
        assert bias(case, plan, block_size) < 1e-12


def test_the_masked_law_is_the_target_law_given_the_allowed_tokens():
    masked, table = (
        regex_case(LAWS["T=1"], "random"),
        torch.randn(5, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2,
    )
    for answer in ((), (0,), (2,), (3, 2), (2, 0)):
        tokens = PROMPT + answer
        allowed = one_hot(0) * 0
        allowed[may_follow(answer)] = 1
        expected = table[tokens[-2:]].softmax(-1) * allowed
        assert (masked.p(tokens) - expected / expected.sum()).abs().max() < 1e-15


@pytest.mark.parametrize("judge", [judge_by_law, judge_fast, judge_coupled])
@pytest.mark.parametrize("greedy", [True, False])
def test_rows_after_an_impossible_draft_are_never_judged(judge, greedy):
    """Every block of three tokens after `a`: most break the grammar, and every row after that would have no law."""
    rng, prompt = torch.Generator().manual_seed(0), [*PROMPT, 0]
    broken, accepted = 0, 0
    for trial, block in enumerate(product(range(5), repeat=3)):
        matcher, logits = regex_matcher(), torch.randn(4, 5, generator=rng)
        noise = Coupled(trial) if judge is judge_coupled else Streams(trial)
        draft = Draft(list(block), FewTokens.certain(block, 5, "cpu"))
        verdict = judge(Law((matcher.processor,), greedy=greedy), prompt, draft, 3, Scored(logits, logits[:, :0]), noise)
        said = [0, *block[: verdict.num_accepted], verdict.next_token]
        assert all(said[k] in may_follow(tuple(said[:k])) for k in range(len(said)))
        broken += not may_follow((0, *block))
        accepted += verdict.num_accepted
    assert broken > 100 and accepted > 20
    with pytest.raises(LogitsError):  # as such a row would be
        probs(Law((regex_matcher().processor,)), [[*prompt, 0]], logits[:1])


# Masks -----------------------------------------------------------------------------------


@cache
def words():
    return word_tokenizer(words=['{"', '":', "name", "green", '", "', "tags", "true", "  ", "ee"], special=["</s>", "<pad>"])


LITERALS = r'\{"name": "(Ann|Bob)", "tags": \["green"(, "green")*\]\}'


def one_by_one(grammar: Grammar, answer: list[int]) -> torch.Tensor:
    """The mask of a matcher that has seen no other text."""
    return grammar.matcher(0).processor(torch.tensor([answer], dtype=torch.long), torch.zeros(1, 300))


@pytest.mark.parametrize("trail", [3, module.TRAIL])
def test_masks_depend_on_the_text_alone(monkeypatch, trail):
    monkeypatch.setattr(module, "TRAIL", trail)
    grammar = Grammar.from_json_schema(words(), PERSON, end_ids=[words().eos_token_id])
    rng, answers = random.Random(0), []
    for text in ('{"name": "Ann", "age": 3, "tags": ["green"]}', '{"name":"","age":150,"tags":[]}', '{"nane": 1}', '{\n  "name": "ee"'):
        ids = [*words().encode(text), words().eos_token_id]
        answers += [[*ids[:k], *rng.choices(range(300), k=rng.randrange(3))] for k in range(len(ids) + 1)]
    expected = {tuple(answer): one_by_one(grammar, answer) for answer in answers}
    assert 5 < sum(bool(torch.isfinite(mask).any()) for mask in expected.values()) < len(expected) - 5
    matcher = grammar.matcher(2)
    for _ in range(3):
        rng.shuffle(answers)
        for answer in answers:
            assert torch.equal(matcher.processor(torch.tensor([[7, 7, *answer]]), torch.zeros(1, 300)), expected[tuple(answer)])
    assert len(matcher.trail) <= trail


def test_a_draft_costs_one_step_a_token(monkeypatch):
    """A round asks for each prefix of the draft, then again when it is judged; a rejection goes back."""
    grammar = Grammar.json_object(words(), end_ids=[words().eos_token_id])
    steps = []
    after = module.State.after
    monkeypatch.setattr(module.State, "after", lambda state, token: steps.append(token) or after(state, token))
    ids = words().encode('{"name": {"tags": ["green", true]}}')
    matcher = grammar.matcher(0)
    for _ in ("drafted", "judged"):
        for k in range(len(ids) + 1):
            matcher.processor(torch.tensor([ids[:k]], dtype=torch.long), torch.zeros(1, 260))
    assert steps == ids
    matcher.processor(torch.tensor([[*ids[:-2], 5]]), torch.zeros(1, 260))
    assert len(steps) == len(ids) + 1


def test_only_end_tokens_end_a_text_and_only_where_it_may_end():
    pad, eos = words().convert_tokens_to_ids(["<pad>", "</s>"])
    [b], [z] = words().encode("b"), words().encode("z")
    for end_ids in ([eos], [pad], [pad, eos], frozenset([eos, z])):
        matcher = Grammar.from_regex(words(), "a?b+", end_ids=end_ids).matcher(0)
        ask = lambda text, *more: matcher.processor(torch.tensor([[*words().encode(text), *more]], dtype=torch.long), torch.zeros(1, 300))  # noqa: B023, E731
        allowed = lambda *at: torch.isfinite(ask(*at)[0]).nonzero()[:, 0].tolist()  # noqa: B023, E731
        assert allowed("a") == [b]
        assert allowed("ab") == sorted({b, *end_ids})
        for end in end_ids:
            assert allowed("ab", end) == allowed("ab", end, end) == sorted(end_ids)
            assert allowed("a", end) == allowed("ab", end, b) == []
        assert allowed("ab", ({eos, pad} - set(end_ids) or {299}).pop()) == []  # another special token is no end
        assert allowed("ab", 299) == []  # a row without a token


@pytest.mark.parametrize("width", [258, 320, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_may_be_wider_than_the_tokenizer(width, dtype):
    tokenizer = word_tokenizer(special=["</s>", "<pad>"])
    matcher = Grammar.from_regex(tokenizer, ".*", end_ids=[256]).matcher(0)
    logits = torch.randn(1, width).to(dtype)
    before = logits.clone()
    masked = matcher.processor(torch.empty(1, 0, dtype=torch.long), logits)
    allowed = torch.isfinite(masked)[0]
    assert masked.shape == (1, width) and masked.dtype == dtype and torch.equal(logits, before)
    assert torch.equal(masked[0, allowed], logits[0, allowed]) and 50 < allowed.sum() < 258
    assert not allowed[257:].any() and (width < 257 or allowed[256])


def test_forced_tokens_are_proposed_up_to_the_end():
    tokenizer = words()
    grammar = Grammar.from_regex(tokenizer, r'x\{"name": (true|false)\}', end_ids=[tokenizer.eos_token_id])
    prompt = [1, 2, 3]
    propose = lambda text: tokenizer.decode(grammar.matcher(3).propose([*prompt, *tokenizer.encode(text)]))  # noqa: E731
    assert propose("") == 'x{"name": '
    assert propose('x{"na') == 'me": '
    assert propose('x{"name": f') == "alse}</s>"
    assert propose('x{"name": true}') == "</s>"
    assert propose('x{"name": true}</s>') == propose("y") == ""


def test_proposed_tokens_may_follow_one_another():
    grammar = Grammar.from_regex(words(), LITERALS, end_ids=[words().eos_token_id])
    ids, proposed = [], 0
    for piece in ("", "An", '", "', '"]'):
        matcher = grammar.matcher(0)
        ids += words().encode(piece)
        for token in matcher.propose(ids):
            assert torch.isfinite(matcher.processor(torch.tensor([ids], dtype=torch.long), torch.zeros(1, 300))[0, token])
            ids.append(token)
            proposed += 1
    assert words().decode(ids) == '{"name": "Ann", "tags": ["green", "green"]}</s>' and proposed > 10


def test_the_tokenizer_is_prepared_once(monkeypatch):
    made = []
    prepare = module.llguidance.hf.from_tokenizer
    monkeypatch.setattr(module.llguidance.hf, "from_tokenizer", lambda tokenizer: made.append(tokenizer) or prepare(tokenizer))
    tokenizer = word_tokenizer()
    for regex in ("a", "b"):
        Grammar.from_regex(tokenizer, regex, end_ids=[256])
    assert made == [tokenizer]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda t: Grammar.from_json_schema(t, {"type": "foo"}, end_ids=[256]), "foo"),
        (lambda t: Grammar.from_json_schema(t, {"type": "string", "const": 1}, end_ids=[256]), "Unsatisfiable"),
        (lambda t: Grammar.from_json_schema(t, {"not": {"type": "string"}}, end_ids=[256]), "not"),
        (lambda t: Grammar.from_json_schema(t, {"$ref": "#/$defs/none"}, end_ids=[256]), "none"),
        (lambda t: Grammar.from_json_schema(t, ["string"], end_ids=[256]), "object"),
        (lambda t: Grammar.from_json_schema(t, nested_schema(150), end_ids=[256]), "recursion limit"),
        (lambda t: Grammar.from_json_schema(t, {"allOf": [{"$ref": "#"}]}, end_ids=[256]), "further: [A-Za-z]+$"),
        (lambda t: Grammar.from_regex(t, "(?=a)b", end_ids=[256]), "look-ahead"),
        (lambda t: Grammar.from_regex(t, "(", end_ids=[256]), "unclosed"),
        (lambda t: Grammar.from_lark(t, "start: nowhere", end_ids=[256]), "nowhere"),
        (lambda t: Grammar.from_regex(t, "a", end_ids=[]), "end tokens"),
        (lambda t: Grammar.from_regex(t, "a", end_ids=[1000]), "1000"),
        (lambda t: Grammar.from_regex("no tokenizer", "a", end_ids=[0]), "tokenizer"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_its_reason(make, reason):
    with pytest.raises(SettingError) as refused:
        make(word_tokenizer())
    assert re.search(reason, refused.value.message)


def nested_schema(depth: int) -> dict:
    return {"properties": {"a": nested_schema(depth - 1)}} if depth else {}


# Whole answers ---------------------------------------------------------------------------


class Forced:
    """Proposes what the grammar forces, and nothing else."""

    block_size = 8

    def __init__(self, matcher: Matcher, vocab_size: int):
        self.matcher, self.vocab_size, self.num_drafted = matcher, vocab_size, 0

    def start(self) -> None:
        pass

    def draft(self, ids, limit, law, generator) -> Draft:
        tokens = self.matcher.propose(ids)[:limit]
        self.num_drafted += len(tokens)
        return Draft(tokens, FewTokens.certain(tokens, self.vocab_size, "cpu"))

    def commit(self, features_TMD) -> None:
        pass


@cache
def tiny_target() -> Target:
    return wide_target(words())


def answer(target: Target, head, schema, drafter: str, prompt: list[int], max_new_tokens: int, **settings):
    matcher = Grammar.from_json_schema(target.tokenizer, schema, end_ids=target.eos_ids).matcher(len(prompt))
    drafting = Forced(matcher, target.vocab_size) if drafter == "forced" else drafter
    return generate(target, head, prompt, max_new_tokens, drafter=drafting, plan="fixed", logits_processors=[matcher.processor], **settings)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_random_model_answers_by_the_schema_whoever_drafts(schema):
    target = tiny_target()
    head = tiny_head(target)
    finished = 0
    for seed in range(3):
        prompt = [seed, 50, 60]
        greedy = {d: answer(target, head, SCHEMAS[schema], d, prompt, 250).token_ids for d in ("none", "dspark", "lookup", "forced")}
        assert len({tuple(ids) for ids in greedy.values()}) == 1
        for drafter in greedy:
            result = answer(target, head, SCHEMAS[schema], drafter, prompt, 250, temperature=1.0, seed=seed)
            if result.finish_reason == "stop":
                finished += 1
                assert fits(json.loads(result.text), schema), result.text
            # every text that is cut short is the beginning of one that fits
            mask = one_by_one(Grammar.from_json_schema(target.tokenizer, SCHEMAS[schema], end_ids=target.eos_ids), result.token_ids)
            assert torch.isfinite(mask).any()
    assert finished > 6


def test_forced_tokens_save_passes():
    target, prompt = tiny_target(), [1, 2]
    grammar = Grammar.from_regex(target.tokenizer, LITERALS, end_ids=target.eos_ids)
    for drafter in ("forced", "none"):
        matcher = grammar.matcher(len(prompt))
        drafting = Forced(matcher, target.vocab_size) if drafter == "forced" else drafter
        result = generate(target, None, prompt, 250, 1.0, drafter=drafting, plan="fixed", logits_processors=[matcher.processor])
        assert re.fullmatch(LITERALS, result.text)
        assert result.tau > 1.5 if drafter == "forced" else result.tau == 1


def test_a_stopped_text_of_the_law_with_a_mask_fits_at_every_length():
    """One token fewer each time: the limit falls into every place of a block."""
    target = tiny_target()
    head = tiny_head(target)
    grammar = Grammar.from_json_schema(target.tokenizer, PERSON, end_ids=target.eos_ids)
    for limit in range(1, 20):
        matcher = grammar.matcher(2)
        rounds = list(stream(target, head, [1, 2], max_new_tokens=limit, law=make_law(1.0, logits_processors=[matcher.processor])))
        ids = [token for done in rounds for token in done.tokens]
        assert len(ids) == limit or ids[-1] in target.eos_ids
        assert torch.isfinite(one_by_one(grammar, ids)).any()


@pytest.mark.parametrize("with_head", [True, False])
def test_requests_of_the_engine_follow_their_grammars(monkeypatch, tmp_path, with_head):
    """Several at once, greedy and drawn, with forced tokens proposed or not: each gets the plain loop's answer."""
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    target = tiny_target()
    grammars = [Grammar.from_json_schema(target.tokenizer, SCHEMAS[name], end_ids=target.eos_ids) for name in [*SCHEMAS, "person"]]
    law = lambda temperature, processor: make_law(temperature, logits_processors=[processor])  # noqa: E731
    answers_together(target, with_head, grammars, law, 80)


# The demo target -------------------------------------------------------------------------

ASKED = {
    "person": ["Describe Ann, a baker, as JSON.", "Invent a pirate: name, age and favourite colours as JSON."],
    "choice": ["Is water wet?"],
    "either": ["Give a point on a line, as JSON."],
    "reference": ["Two lamps are on. Describe left and right as JSON."],
}
MORE = [
    "a sailor",
    "a king",
    "a child of three",
    "a robot called R2",
    "the oldest woman on earth",
    "nobody",
    "Karl Marx",
    "my cat",
    "Zoë",
    '"Bob"',
]


@pytest.fixture(scope="module")
def pair():
    if not demo.is_complete(demo.cache_directory() / demo.NAME):
        pytest.skip("the demo target is not on this machine")
    target = dspark.load_target(demo.NAME, dtype="bfloat16")
    return target, dspark.load_head(demo.NAME, target)


def check_answers(pair, asked: dict[str, list[str]], temperature: float, drafters) -> None:
    target, head = pair
    for schema, questions in asked.items():
        for question in questions:
            chat = [{"role": "user", "content": question}]
            prompt = target.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            results = [answer(target, head, SCHEMAS[schema], drafter, prompt, 200, temperature=temperature) for drafter in drafters]
            for result in results:
                assert result.finish_reason == "stop" and fits(json.loads(result.text), schema), result.text
            assert temperature or len({tuple(result.token_ids) for result in results}) == 1


def test_the_demo_target_answers_by_the_schema(pair):
    check_answers(pair, ASKED, 0.0, ["none", "dspark", "lookup", "forced"])
    check_answers(pair, ASKED, 1.0, ["dspark"])


@pytest.mark.slow
def test_the_demo_target_answers_many_questions_by_the_schema(pair):
    asked = {"person": [f"Describe {who} as JSON." for who in MORE], "reference": [f"Where is {who}?" for who in MORE[:4]]}
    for temperature in (0.0, 1.0):
        check_answers(pair, asked, temperature, ["none", "dspark", "auto", "forced"])
