"""Heads of one recurrent layer, mtp and eagle3: training walks the chain that drafting walks, drafts keep the law, folders are strict."""

import argparse
import json
import shutil
from dataclasses import replace
from functools import cache
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dspark
from dspark.cli.main import main
from dspark.cli.train import add_arguments, head_shape
from dspark.config import TrainConfig
from dspark.core.decode import decode
from dspark.core.planner import Always
from dspark.core.sampling import GREEDY, Coupled, Streams
from dspark.core.verifier import Draft
from dspark.drafters import Arbiter, MtpDrafter
from dspark.drafters.arbiter import NOMINAL
from dspark.engine.engine import Engine
from dspark.engine.load import Load
from dspark.errors import HeadError, SettingError
from dspark.generation import generate, make_drafter, make_law
from dspark.head.chain import NativeChain
from dspark.head.folder import load_head, save_head
from dspark.head.mtp import stand_for_modules
from dspark.head.recurrent import RecurrentHead
from dspark.measure.lossless import verify_pair
from dspark.target.load import load_target
from dspark.target.native.runtime import NativeRuntime
from dspark.target.target import Target
from dspark.train import trainer
from dspark.train.batch import make_batch
from dspark.train.features import FeatureStore
from dspark.train.run import check_shape, three_layers, train
from dspark.train.sample import sample_batch
from dspark.train.warmstart import new_head, new_recurrent_head
from oracle import Oracle, plain_greedy
from saved import save_tiny_target
from test_engine import mixed_requests, reference, serve
from test_turns import AtRandom
from tiny import NATIVE_SHAPE, tiny_head, tiny_model, tiny_recurrent

KINDS = ("mtp", "eagle3")
PROMPT = [3, 17, 99, 45, 8, 8, 101, 64, 3, 17, 99]
NUM_NEW = 14
ROUNDING = 1e-4
CONFIG = TrainConfig(
    steps=6, sequences_per_step=2, anchors_per_sequence=5, held_out=2, num_prompts=0, max_answer_tokens=12, teacher_tokens=8, learning_rate=1e-2
)  # fmt: skip


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_model("llama"), name="tiny")


@cache
def target_of(family: str) -> Target:
    return Target(tiny_model(family), name="tiny")


@cache
def native_target() -> Target:
    model = tiny_model("llama", **NATIVE_SHAPE)
    return Target(model, name="tiny", runtime=NativeRuntime(model))


@pytest.fixture(params=["eager", "native"])
def any_runtime(request, target) -> Target:
    return target if request.param == "eager" else native_target()


def head_for(target: Target, kind: str, block_size: int = 4, draft_vocab: int | None = None) -> RecurrentHead:
    """One that runs as its target does."""
    return tiny_recurrent(target, kind, block_size, draft_vocab, head_dim=8 if target.runtime is None else 16)


def committed(drafter: MtpDrafter, ids: list[int]) -> MtpDrafter:
    drafter.start()
    drafter.commit(drafter.target.prefill(drafter.target.start(), ids[:-1]))
    return drafter


def laws_along(drafter: MtpDrafter, ids: list[int], tokens: list[int]) -> torch.Tensor:
    """The stated laws at T = 1 of a draft after `ids` that says these tokens."""
    forced = Coupled(0)
    wanted = lambda place: torch.tensor([tokens[place - len(ids)]])  # noqa: E731
    forced.exponentials = lambda place, size, device: torch.ones(size).index_fill(0, wanted(place), 1e-30)  # type: ignore[method-assign]
    draft = drafter.draft(ids, len(tokens), make_law(1.0), forced)
    assert draft.tokens == tokens
    return torch.stack([draft.probs_KV[k] for k in range(len(tokens))])


def record(num_prompt: int, num_answer: int, seed: int = 0) -> dict:
    ids = torch.randint(128, (num_prompt + num_answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"prompt_ids": ids[:num_prompt], "answer_ids": ids[num_prompt:], "temperature": float(seed % 2), "kind": "x"}


@pytest.mark.parametrize("draft_vocab", [None, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_training_walks_the_chains_that_are_drafted(kind, draft_vocab, target, tmp_path):
    """The laws of every anchor's chain, with the real tokens given, are those of a drafter that says these tokens."""
    head = tiny_recurrent(target, kind, block_size=4, draft_vocab=draft_vocab)
    target.tap(head.layer_ids)
    # the draft vocabulary has the even tokens where it is reduced
    given = record(3, 9)
    given["answer_ids"] = [token // 2 * 2 for token in given["answer_ids"]]
    ids = given["prompt_ids"] + given["answer_ids"]
    sample = FeatureStore(target, [given], tmp_path, 8, 1.0)[0]
    exact = replace(sample, features_SMD=target.prefill(target.start(), ids[:-1]))  # not as the cache rounds them
    batch = make_batch(
        [exact, FeatureStore(target, [record(2, 14, 1)], tmp_path / "b", 8, 1.0)[0]], 9, 4, None
    )  # padded: another is longer
    assert batch.following_NS[0, : len(ids) - 1].tolist() == ids[1:]
    known = trainer.known_states(head, target, batch)
    S = batch.features_NSMD.shape[1]
    states = head.unroll(batch.features_NSMD.float(), known[:, :S], known[:, S:].unflatten(1, (9, 3)), batch.anchors_NA, batch.visible_NAS)
    laws = head.logits(states).softmax(-1)
    for a, position in enumerate(batch.anchors_NA[0].tolist()):
        text, tokens = ids[: position + 1], ids[position + 1 : position + 5]
        found = laws_along(committed(MtpDrafter(head, target), text), text, tokens)[:, head.draft_ids]
        assert (found - laws[0, a, : len(tokens)]).abs().max() < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_without_a_state_before_it_teaches_nothing(kind, target, tmp_path):
    head = tiny_recurrent(target, kind, trained_steps=2)
    target.tap(head.layer_ids)
    store = FeatureStore(target, [record(1, 9)], tmp_path, 8, 1.0)
    batch = make_batch([store[0]], 9, 2, None)
    kept = trainer.told(head, batch).valid_NAG
    assert batch.anchors_NA[0, 0] == 0 and batch.valid_NAG[0, 0].all() and not kept[0, 0].any()
    assert torch.equal(kept[0, 1:], batch.valid_NAG[0, 1:])
    assert trainer.told(tiny_head(target), batch) is batch
    assert MtpDrafter(head, target).draft([5], 3, GREEDY, torch.Generator()).tokens == []


@pytest.mark.parametrize("block_size", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(kind, block_size, any_runtime):
    target = any_runtime
    head = head_for(target, kind, block_size, draft_vocab=None if block_size % 2 else 32)
    for length in (1, 2, block_size + 2):
        prompt = (PROMPT * 2)[:length]
        result = generate(target, head, prompt, NUM_NEW, plan="fixed")
        assert result.token_ids == plain_greedy(target, prompt, NUM_NEW)
        assert sum(done.num_drafted for done in result.rounds_log) > NUM_NEW / 2


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "deepseek_v3", "qwen3_5"])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_of_other_families_keep_their_text(kind, family):
    target = target_of(family)
    result = generate(target, tiny_recurrent(target, kind), PROMPT, NUM_NEW, plan="fixed")
    assert result.token_ids == plain_greedy(target, PROMPT, NUM_NEW)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_of_what_was_rejected(kind, any_runtime):
    """After rounds of every accepted count, and drafts of every length, a draft is that of a drafter which saw the final text only."""
    target = any_runtime
    head = head_for(target, kind)
    truth, drafter, lengths, compared = plain_greedy(target, PROMPT, 24), MtpDrafter(head, target), cycle([4, 1, 3, 0, 2]), 0

    class Mixed(Oracle):
        def draft(self, ids, limit, law, generator):
            nonlocal compared
            num = next(lengths)
            tokens = drafter.draft(ids, num, law, generator).tokens
            assert len(tokens) == num
            if tokens:
                fresh = committed(MtpDrafter(head, target), list(ids))
                assert fresh.draft(ids, num, law, generator).tokens == tokens
                assert drafter.num_final == fresh.num_final
                assert target.runtime is not None or drafter.cache.get_seq_length() == fresh.cache.get_seq_length()
                assert (laws_along(drafter, ids, tokens) - laws_along(fresh, ids, tokens)).abs().max() < ROUNDING
                compared += 1
            return super().draft(ids, limit, law, generator)

        def commit(self, features_TMD):
            drafter.commit(features_TMD)

        def start(self):
            drafter.start()
            super().start()

    said = [t for done in decode(target, Mixed(truth, len(PROMPT), 128, 4), PROMPT, GREEDY, Streams(0), 24) for t in done.tokens]
    assert said == truth and compared > 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_read_in_passes_of_any_size(kind, any_runtime, monkeypatch):
    target = any_runtime
    head = head_for(target, kind)
    whole = laws_along(committed(MtpDrafter(head, target), PROMPT), PROMPT, [4, 8, 12])
    monkeypatch.setattr("dspark.head.recurrent.PASS_ROWS", 3)
    monkeypatch.setattr("dspark.target.native.stack.MAX_ROWS", 3)
    pieces = laws_along(committed(MtpDrafter(head, target), PROMPT), PROMPT, [4, 8, 12])
    assert (whole - pieces).abs().max() < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_replays_and_a_mask_ends_a_draft(kind, any_runtime):
    target = any_runtime
    head = head_for(target, kind, draft_vocab=64)
    answers = [generate(target, head, PROMPT, 16, temperature=1.0, seed=seed, plan="fixed").token_ids for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]

    def none_after_two(ids, scores):
        return torch.full_like(scores, -float("inf")) if ids.shape[1] >= len(PROMPT) + 2 else scores

    drafter = committed(make_drafter(None, target, head), PROMPT)
    for temperature in (0.0, 1.0):
        draft = drafter.draft(PROMPT, 3, make_law(temperature, logits_processors=[none_after_two]), torch.Generator())
        assert (len(draft.tokens), draft.num_asked) == (2, 3) and all(token % 2 == 0 for token in draft.tokens)


@pytest.mark.parametrize("draft_vocab", [None, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_natively_a_head_says_what_it_says_eagerly(kind, draft_vocab):
    """States and logits of slots read in two passes, and the laws of a whole draft."""
    target = native_target()
    head = head_for(target, kind, draft_vocab=draft_vocab)
    drafters = [committed(MtpDrafter(head, target, modules=modules), PROMPT) for modules in (None, head)]
    assert isinstance(drafters[0].modules, NativeChain) and drafters[1].modules is head
    passes = []
    for modules, features_TMD in ((drafter.modules, torch.cat(drafter.pending)) for drafter in drafters):
        hidden_TD, cache = modules.hidden(features_TMD), modules.start()
        first = modules.run(0, hidden_TD[:4], PROMPT[1:5], 0, cache)
        passes.append([*first, *modules.run(0, hidden_TD[4:], PROMPT[5:], 4, cache)])
    for native, eager in zip(*passes, strict=True):
        assert (native - eager).abs().max() < ROUNDING * eager.abs().max()
    laws = [laws_along(drafter, PROMPT, [4, 8, 12, 64]) for drafter in drafters]
    assert (laws[0] - laws[1]).abs().max() < ROUNDING


@pytest.mark.parametrize("law", ["greedy", "T=0.8", "top-k, top-p", "min-p"])
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_in_one_go_is_what_is_drawn_token_by_token(kind, seeded, law, monkeypatch):
    """The same tokens from the same numbers, and the same stated laws."""
    target = native_target()
    head = head_for(target, kind, draft_vocab=64)
    settings = {"greedy": {"temperature": 0.0}, "T=0.8": {"temperature": 0.8}, "min-p": {"temperature": 1.2, "min_p": 0.05}}
    wanted = make_law(**settings.get(law, {"temperature": 0.9, "top_k": 12, "top_p": 0.8}))

    def drafts() -> list[Draft]:
        drafter = committed(MtpDrafter(head, target), PROMPT)
        return [drafter.draft(PROMPT, 4, wanted, Coupled(n) if seeded else torch.Generator().manual_seed(n)) for n in range(20)]

    at_once, calls = drafts(), []
    follow = NativeChain.follow
    monkeypatch.setattr(NativeChain, "follow", lambda *arguments: calls.append(1) or follow(*arguments))
    assert [d.tokens for d in drafts()] == [d.tokens for d in at_once] and len(calls) == 20
    monkeypatch.setattr("dspark.drafters.mtp.NativeChain", type(None))  # so that no runner is one
    one_by_one = drafts()
    assert len(calls) == 20 and (len({tuple(d.tokens) for d in at_once}) == 1) == (law == "greedy")
    for together, alone in zip(at_once, one_by_one, strict=True):
        assert together.tokens == alone.tokens and len(together.tokens) == 4
        assert max((together.probs_KV[k] - alone.probs_KV[k]).abs().max() for k in range(4)) < 1e-5


def test_a_head_of_another_precision_than_the_target_drafts_token_by_token(monkeypatch):
    target = native_target()
    head = head_for(target, "eagle3")
    exact = committed(MtpDrafter(head, target), PROMPT).draft(PROMPT, 4, GREEDY, torch.Generator()).tokens
    monkeypatch.setattr(NativeChain, "follow", lambda *arguments: pytest.fail("it would read embeddings of another precision"))
    drafter = committed(MtpDrafter(head.bfloat16(), target), PROMPT)
    assert not drafter.modules.follows and len(drafter.draft(PROMPT, 4, GREEDY, torch.Generator()).tokens) == len(exact) == 4


def test_broken_numbers_end_a_draft_behind_the_tokens_they_led_to():
    target = native_target()
    drafter = committed(MtpDrafter(head_for(target, "eagle3"), target), PROMPT)

    def draft() -> Draft:
        return drafter.draft(PROMPT, 4, make_law(1.0), Coupled(0))

    first = draft().tokens
    assert len(set(first)) == 4
    table = target.model.get_input_embeddings().weight
    kept = table.detach().clone()
    try:
        table.data[first[1]] = float("nan")  # joined in the third token's slot
        broken = draft()
    finally:
        table.data.copy_(kept)
    assert broken.tokens == first[:2] and broken.num_asked == 4
    assert draft().tokens == first


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_goes_on_from_what_both_texts_share(kind, any_runtime):
    target = any_runtime
    head = head_for(target, kind)
    texts = [[*PROMPT, 7, 7], [*PROMPT[:6], 5, 9, 64]]
    parent = committed(MtpDrafter(head, target), texts[0])
    truth = [committed(MtpDrafter(head, target), text).draft(text, 4, GREEDY, torch.Generator()).tokens for text in texts]
    assert parent.draft(texts[0], 4, GREEDY, torch.Generator()).tokens == truth[0]
    known = 6 - 1  # the slot before the first other token has read that token
    fork = parent.fork(known)
    fork.commit(target.prefill(target.start(), texts[1][:-1])[known:])
    assert fork.draft(texts[1], 4, GREEDY, torch.Generator()).tokens == truth[1]
    assert parent.draft(texts[0], 4, GREEDY, torch.Generator()).tokens == truth[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_check_of_verify_passes(kind, target, tmp_path):
    head = tiny_recurrent(target, kind, draft_vocab=64)
    save_head(head, target, tmp_path, PROMPT, {}, "")
    checks = verify_pair(target, load_head(tmp_path, target), [PROMPT, PROMPT[3:]], 12)
    assert all(check.passed for check in checks) and f"law of a round at T=1 ({kind})" in [check.name for check in checks]


# Folders


@pytest.fixture(scope="module", params=KINDS)
def saved(request, target, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / request.param
    save_head(tiny_recurrent(target, request.param, draft_vocab=64), target, folder, PROMPT, {"command": "test"}, "# card\n")
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def damage(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_saved_head_comes_back_and_is_written_alike(saved, target, tmp_path):
    head, loaded = tiny_recurrent(target, saved.name, draft_vocab=64), dspark.load_head(saved, target)
    assert loaded.config == head.config and loaded.kind == saved.name and torch.equal(loaded.draft_ids, head.draft_ids)
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16().float())
    assert loaded.self_test is not None and loaded.self_test.accepted == loaded.self_test.accepted_then
    save_head(loaded, target, tmp_path / "again", PROMPT, {"command": "test"}, "# card\n")
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()
    }


def test_names_are_those_of_other_projects(saved):
    names = load_file(saved / "model.safetensors").keys()
    config = json.loads((saved / "config.json").read_text())
    if saved.name == "eagle3":  # SpecForge's
        layer = ("hidden_norm", "input_layernorm", "post_attention_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo"),
                 *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))  # fmt: skip
        assert names == {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d", *(f"midlayer.{name}.weight" for name in layer)}
        assert (config["architectures"], config["draft_vocab_size"], config["num_hidden_layers"]) == (["LlamaForCausalLMEagle3"], 64, 1)
    else:  # DeepSeek's
        assert {"layers.0.enorm.weight", "layers.0.hnorm.weight", "layers.0.eh_proj.weight", "draft_ids"} < names
        assert "lm_head.weight" not in names


def test_d2t_holds_offsets(saved, target):
    tensors = load_file(saved / "model.safetensors")
    if "d2t" in tensors:
        ids = torch.arange(64) + tensors["d2t"]
        assert torch.equal(ids, torch.arange(64) * 2) and torch.equal(tensors["t2d"].nonzero().flatten(), ids)


DAMAGES = {
    "missing norm.weight": lambda t: t.pop("norm.weight"),
    "unexpected more.weight": lambda t: t.update({"more.weight": torch.zeros(2)}),
    "norm.weight has shape": lambda t: t.update({"norm.weight": torch.zeros(3)}),
    "NaN or infinity": lambda t: t["norm.weight"].fill_(float("nan")),
    "golden vectors of .* do not come out again": lambda t: t["norm.weight"].mul_(-1),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_damaged_tensors_are_refused(says, folder, target):
    damage(folder, DAMAGES[says])
    with pytest.raises(HeadError, match=says):
        load_head(folder, target)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("t2d"),
        lambda t: t["d2t"].add_(1),
        lambda t: t["t2d"].logical_not_(),
        lambda t: t.update(d2t=(t["d2t"] + 1).to(torch.uint64)),
    ],
)
def test_damaged_vocabulary_maps_are_refused(change, folder, target):
    if folder.name == "eagle3":
        damage(folder, change)
        with pytest.raises(HeadError, match="t2d"):
            load_head(folder, target)


@pytest.mark.parametrize(
    ("section", "change", "says"),
    [
        (True, {"kind": "eagle9"}, "unknown kind of head 'eagle9'"),
        (True, {"kind": []}, "unknown kind"),
        (True, {"trained_steps": None}, "lacks trained_steps"),
        (True, {"block_size": 0}, "block_size is 0"),
        (True, {"block_size": 5}, "golden"),
        (True, {"target_layer_ids": 3}, "a list was expected"),
        (True, {"target_layer_ids": [0, 9]}, "not all layers"),
        (True, {"target_layer_ids": []}, "not ascending"),
        (True, {"target_layer_ids": [0, 1, 2]}, "last layer|was trained on layers"),
        (False, {"hidden_size": 64}, "hidden size 64"),
        (False, {"hidden_size": "64"}, "hidden_size is '64'"),
        (False, {"attention_bias": True}, "attention_bias"),
        (False, {"num_key_value_heads": 3}, "do not divide"),
        (False, {"layer_types": 5}, "draft layers with 5"),
    ],
)
def test_damaged_configs_are_refused(section, change, says, folder, target):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    (config["dspark"] if section else config).update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(HeadError, match=says):
        load_head(folder, target)


def test_a_token_named_twice_is_refused(saved, folder, target):
    """Its law would be that of one of its rows."""
    if folder.name == "mtp":
        damage(folder, lambda t: t["draft_ids"][-1].copy_(t["draft_ids"][-2]))
        with pytest.raises(HeadError, match="draft_ids do not fit"):
            load_head(folder, target)


def test_another_target_is_refused(saved, tmp_path, capsys):
    with pytest.raises(HeadError, match=r"another target|do not come out"):
        load_head(saved, Target(tiny_model("llama", seed=1), name="tiny"))
    with pytest.raises(HeadError, match="has 2"):
        load_head(saved, Target(tiny_model("llama", num_hidden_layers=2)))


def test_what_takes_dspark_heads_only_says_so(saved, tmp_path, capsys):
    folder = str(save_tiny_target(tmp_path / "target", vocab_size=128))
    for command in (  # before there is a target
        ["calibrate", str(saved), "--target", "/nowhere"],
        ["adapt", str(saved), "--target", "/nowhere", "--out", str(tmp_path / "a")],
        ["convert", str(saved), str(tmp_path / "c"), "--to", "gguf", "--target", "/nowhere"],
    ):
        assert main(command) == 2 and f"{saved} is a head of the kind {saved.name}" in capsys.readouterr().err
    own = load_target(folder)
    save_head(tiny_recurrent(own, saved.name), own, tmp_path / "own", PROMPT, {"command": "test"}, "# card\n")
    capsys.readouterr()
    assert main(["profile", folder, "--head", str(tmp_path / "own"), "--context", "9", "--costs", str(tmp_path / "costs.json")]) == 2
    assert f"own is a head of the kind {saved.name}" in capsys.readouterr().err and not (tmp_path / "costs.json").exists()
    target = Target(tiny_model("llama"), name="tiny")
    head = load_head(saved, target)
    with pytest.raises(SettingError, match="needs a head of another kind"):
        make_drafter("dspark", target, head)
    with pytest.raises(SettingError, match="needs a head of another kind"):
        make_drafter("eagle3", target, tiny_head(target))
    with pytest.raises(SettingError, match="needs a head"):
        make_drafter("eagle3", target, None)


def test_inspect_prints_the_card_and_the_shape(saved, capsys):
    assert main(["inspect", str(saved)]) == 0
    printed = capsys.readouterr().out
    assert "# card" in printed and "golden text" in printed
    assert main(["inspect", str(saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["kind"] == saved.name


# Training


def test_three_layers_of_any_target():
    assert [three_layers(n) for n in (30, 36, 10, 9, 4, 3)] == [(1, 14, 26), (1, 17, 32), (1, 4, 6), (1, 3, 5), (0, 2, 3), (0, 1, 2)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_unbroken_one(kind, optimizer, target, tmp_path):
    config = replace(CONFIG, optimizer=optimizer, checkpoint_seconds=0.0)

    def steps(checkpoint=None, stop_at=None, seed=0) -> dict:
        head = tiny_recurrent(target, kind, 3, trained_steps=3).requires_grad_(True)
        target.tap(head.layer_ids)
        store = FeatureStore(target, [record(3, 10, i) for i in range(8)], tmp_path / "cache", 8, 1.0)

        def maybe_stop(step, result):
            if step == stop_at:
                raise KeyboardInterrupt

        trainer.train_steps(head, target, store, replace(config, seed=seed), checkpoint, maybe_stop)
        return head.state_dict()

    straight = steps()
    with pytest.raises(KeyboardInterrupt):
        steps(tmp_path / "checkpoint.pt", stop_at=4)
    resumed, other = steps(tmp_path / "checkpoint.pt"), steps(seed=1)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert any(not torch.equal(straight[name], other[name]) for name in straight)


@pytest.mark.parametrize(("kind", "chain"), [pytest.param("mtp", 1, marks=pytest.mark.slow), ("mtp", 3), ("eagle3", 3)])
def test_training_raises_the_acceptance_and_the_chain_what_comes_after(kind, chain, target, tmp_path):
    """On the target's own greedy answers, those in training among them: a random target has nothing to teach of others."""
    prompts = [[i % 120 + 1, (7 * i) % 120 + 1] for i in range(28)]
    answers = sample_batch(target, prompts, [0.0] * 28, 16, seed=0)
    given = [{"prompt_ids": p, "answer_ids": a, "temperature": 0.0, "kind": "x"} for p, a in zip(prompts, answers, strict=True)]
    shape = tiny_recurrent(target, kind, 3, trained_steps=chain)
    head = new_recurrent_head(target, shape.config, shape.draft_ids, 0)
    target.tap(head.layer_ids)
    store = FeatureStore(target, given, tmp_path, 8, 1.0)
    config = replace(
        CONFIG, steps=60, sequences_per_step=6, anchors_per_sequence=12, learning_rate=5e-3, held_out=4, teacher_ce=True, ce_weight=1.0
    )
    seen_too = replace(config, held_out=len(given))
    before = trainer.measure(head, target, store, seen_too, len(given))
    seen = []
    trainer.train_steps(
        head, target, store, config, None, lambda step, r: seen.append(r.overlap_NAG[..., -1].sum() / r.valid_NAG[..., -1].sum())
    )
    after = trainer.measure(head, target, store, seen_too, len(given))
    assert sum(seen[-10:]) / 10 > 2 * sum(seen[:5]) / 5  # of the last position that is trained
    assert after["tau_t0"] > before["tau_t0"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_begins_with_the_targets_last_layer_and_norm(kind, target):
    head = new_recurrent_head(target, tiny_recurrent(target, kind).config, torch.arange(128), 0)
    last = target.layers[-1]
    assert torch.equal(head.layer.mlp.down_proj.weight, last.mlp.down_proj.weight)
    assert torch.equal(head.norm.weight, target.model.model.norm.weight)
    wanted = last.self_attn.q_proj.weight
    assert torch.equal(head.layer.self_attn.q_proj.weight[:, -wanted.shape[1] :], wanted)
    assert torch.equal(head.lm_head.weight if kind == "eagle3" else head.output_rows, target.output_rows(torch.arange(128)))
    gemma = target_of("gemma3")  # its norms multiply by one more than they hold
    scaled = new_recurrent_head(gemma, tiny_recurrent(gemma, kind).config, torch.arange(128), 0)
    assert torch.allclose(scaled.norm.weight, 1 + gemma.model.model.norm.weight)


SHAPE = {"block_size": 3, "draft_vocab_size": 260}


@pytest.mark.parametrize("kind", ["mtp", pytest.param("eagle3", marks=pytest.mark.slow)])
def test_the_whole_command_from_nothing_to_a_head_that_drafts(kind, tmp_path, capsys, monkeypatch):
    for slow in ("train.run.estimate", "profiling.read_bandwidth"):
        monkeypatch.setattr(f"dspark.{slow}", lambda *arguments, **settings: 1e10)
    folder, out = str(save_tiny_target(tmp_path / "target")), tmp_path / "head"
    small = ["--num-prompts", "8", "--max-answer-tokens", "12", "--held-out", "2", "--sequences", "2", "--anchors", "4", "--steps", "3"]
    command = ["train", folder, "--out", str(out), "--kind", kind, "--chain", "2", "--block-size", "3", "--draft-vocab", "260", *small]
    assert main([*command, "--json"]) == 0
    provenance = json.loads(capsys.readouterr().out)
    assert min(provenance["held_out_rounds"][name] for name in ("tau_t0", "tau_t1")) >= 1
    assert {len(figures) for name, figures in provenance["held_out_teacher_forced"].items() if "acceptance" in name} == {3}
    assert f"--kind={kind}" in provenance["command"] and json.loads((out / "config.json").read_text())["dspark"]["trained_steps"] == 2
    card = (out / "README.md").read_text()
    assert "trained on 2 steps of its chain" in card and "held-out prompts" in card
    before = (out / "model.safetensors").read_bytes()
    (out / "provenance.json").unlink()
    assert main(["train", folder, "--out", str(out), "--resume"]) == 0
    assert (out / "model.safetensors").read_bytes() == before
    assert main(["train", folder, "--out", str(out), "--resume", "--kind", "dspark"]) == 2
    assert "--kind is dspark" in capsys.readouterr().err
    texts = []
    for options in (["--head", str(out), "--drafter", kind], ["--head", str(out)], ["--head", "none"]):
        assert main(["generate", folder, "hello", "--max-new-tokens", "12", "--plan", "fixed", "--json", *options]) == 0
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert texts[0] == texts[1] == texts[2]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n')
    modes = ["--other", f"mine={out}", "--compare", "plain,mine@fixed,mine@length:1", "--max-new-tokens", "8", "--json"]
    assert main(["bench", folder, "--prompts", str(prompts), *modes]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["modes"]
    assert report["mine@fixed"]["identical_to_plain"] == 1 and len(report["mine@fixed"]["acceptance_by_position"]) == 3


def test_training_goes_on_from_a_recurrent_head(tmp_path):
    target = load_target(save_tiny_target(tmp_path / "target"))
    head = tiny_recurrent(target, "mtp", 3, trained_steps=2)
    save_head(head, target, tmp_path / "first", PROMPT, {}, "")
    answers = [record(3, 10, i) for i in range(8)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    given = {"answers": [tmp_path / "answers.jsonl"], "start_from": tmp_path / "first"}
    train(target, tmp_path / "second", replace(CONFIG, steps=1, learning_rate=1e-12), {}, **given)
    assert load_file(tmp_path / "second" / "model.safetensors").keys() == load_file(tmp_path / "first" / "model.safetensors").keys()
    second = load_head(tmp_path / "second", target)
    assert second.config == head.config
    assert all(torch.equal(tensor, head.state_dict()[name].bfloat16().float()) for name, tensor in second.state_dict().items())
    with pytest.raises(SettingError, match="no confidences"):
        train(target, tmp_path / "third", replace(CONFIG, detached_confidence=True), {}, **given)
    with pytest.raises(HeadError, match="takes DSpark and DFlash heads"):
        train(target, tmp_path / "third", CONFIG, {"markov_rank": 8}, **given)


def test_kinds_without_a_chain_are_shorthands(tmp_path, capsys):
    folder, out = str(save_tiny_target(tmp_path / "target")), tmp_path / "head"
    small = ["--num-prompts", "8", "--max-answer-tokens", "12", "--held-out", "2", "--sequences", "2", "--anchors", "4", "--steps", "1"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    shapes = [head_shape(parser.parse_args([folder, "--out", str(out), *given])) for given in (["--kind", "dflash"], ["--rank", "0"])]
    assert shapes[0] == shapes[1] and shapes[0]["markov_rank"] == 0
    for given, says in {
        "--kind dflash --rank 8": "--rank cannot take effect with --kind dflash",
        "--kind mtp --rank 8": "--rank cannot take effect with --kind mtp",
        "--kind mtp --layers 2": "--layers cannot",
        "--kind mtp --taps 1": "--taps cannot",
        "--kind mtp --confidence detached": "--confidence cannot",
        "--kind eagle3 --sequential rnn": "--sequential cannot",
        "--kind eagle3 --taps 1,2": "reads 3 layers",
        "--kind eagle3 --taps 1,2,9": "has 4 layers",
        "--kind mtp --chain 6": "--chain is 6",
        "--kind mtp --chain 0": "--chain is 0",
        "--chain 2": "--chain cannot take effect with --kind dspark",
        f"--kind mtp --start-from {out}": "--kind cannot take effect beside --start-from",
    }.items():
        assert main(["train", folder, "--out", str(tmp_path / "x"), *small, *given.split()]) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
    with pytest.raises(SettingError, match="the target has 2"):
        train(
            Target(tiny_model("llama", num_hidden_layers=2)),
            tmp_path / "x",
            CONFIG,
            SHAPE | {"kind": "eagle3"},
            answers=[tmp_path / "none"],
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_grafted_model_drafts_with_them(kind):
    model = tiny_model("llama")
    plain = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=NUM_NEW)
    head = tiny_recurrent(Target(model), kind)
    dspark.graft(model, head)
    seen = []
    drafted = head.run
    head.run = lambda *arguments: seen.append(1) or drafted(*arguments)
    assert torch.equal(model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=NUM_NEW), plain) and seen
    dspark.ungraft(model)


@pytest.mark.parametrize("runtime", ["eager", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_drafts_with_them_and_keeps_every_answer(kind, runtime, monkeypatch):
    monkeypatch.setattr("dspark.engine.engine.Arbiter", AtRandom)
    monkeypatch.setattr("dspark.engine.engine.measured_load", lambda *measured: Load(NOMINAL, {}))
    monkeypatch.setattr("dspark.engine.engine.planning_costs", lambda *measured: NOMINAL)
    model, steps = tiny_model("llama", **NATIVE_SHAPE), []
    target = Target(model, runtime=NativeRuntime(model) if runtime == "native" else None)
    requests = mixed_requests(12)
    engine = Engine(target, head_for(target, kind, draft_vocab=64), max_running=4, plan="fixed", on_step=steps.append)
    assert f"the head ({kind})" in engine.notes()[0]
    ears = [ear for asked in (requests, requests[:4]) for ear in serve(engine, asked)]  # some again, which are known then
    truths = [reference(target, request) for request in requests]
    assert [ear.ids for ear in ears] == truths + truths[:4]
    rounds = [done for step in steps for done in step.rounds if done.drafter == "mtp"]
    assert any(done.drafted for done in rounds) and any(ear.last.cached_tokens for ear in ears)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_takes_turns_with_lookup(kind, target):
    head = tiny_recurrent(target, kind)
    drafter = make_drafter("auto", target, head)
    assert isinstance(drafter, Arbiter) and drafter.mtp.head is head and drafter.head is None
    result = generate(target, head, PROMPT * 3, 40, drafter=drafter, plan=drafter.plan_with(NOMINAL, Always()))
    assert result.token_ids == plain_greedy(target, PROMPT * 3, 40)


def test_planners_ask_for_any_length(target):
    lengths = cycle([1, 4, 0, 2, 5, 3])

    class Changing(Always):
        def ask(self, limit, num_tokens):
            return min(limit, next(lengths))

    head = tiny_recurrent(target, "eagle3", 5)
    result = generate(target, head, PROMPT, NUM_NEW, plan=Changing())
    assert result.token_ids == plain_greedy(target, PROMPT, NUM_NEW)


# In the place of the target's own modules


@pytest.mark.parametrize("runtime", ["eager", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_beside_a_dspark_head_they_stand_for_the_targets_modules(kind, runtime):
    model = tiny_model("llama", **NATIVE_SHAPE)
    target = Target(model, runtime=NativeRuntime(model) if runtime == "native" else None)
    head, chain = tiny_head(target), head_for(target, kind, draft_vocab=64)
    stand_for_modules(target, chain)
    truth = plain_greedy(target, PROMPT * 3, 40)
    turns = make_drafter("auto", target, head)
    assert turns.mtp.head is chain and turns.head.head is head
    seeded = make_drafter("mtp+dspark", target, head)
    assert seeded.mtp.head is chain
    each = {"turns": AtRandom(head=turns.head, lookup=turns.lookup, expected=[0.5] * 4, trust=8.0, mtp=turns.mtp), "seeded": seeded}
    for drafter in (*each.values(), make_drafter("mtp", target, None)):
        result = generate(target, head, PROMPT * 3, 40, drafter=drafter, plan=drafter if isinstance(drafter, Arbiter) else Always())
        assert result.token_ids == truth and sum(done.num_planned for done in result.rounds_log)
    sampled = [generate(target, head, PROMPT, NUM_NEW, temperature=1.0, seed=3, drafter=seeded, plan=Always()).token_ids for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_only_recurrent_heads_stand_for_modules(target):
    with pytest.raises(HeadError, match="kind dspark cannot stand"):
        stand_for_modules(target, tiny_head(target))


def test_a_head_may_begin_as_a_trained_module():
    target = Target(tiny_model("llama"))
    chain = tiny_recurrent(target, "mtp")
    stand_for_modules(target, chain)
    head = new_head(target, tiny_head(target).config, torch.arange(128), 0, "mtp")
    state = torch.randn(1, 3, target.hidden_size, generator=torch.Generator().manual_seed(0))
    read = chain.layer.hnorm(state)
    expected = chain.layer.eh_proj(torch.cat([torch.zeros_like(read), read], dim=-1))
    taps = len(head.config.target_layer_ids)
    found = head.context(torch.stack([*[torch.zeros_like(state)] * (taps - 1), state], dim=2))
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.99
    assert torch.equal(head.layers[0].mlp.up_proj.weight, chain.layer.mlp.up_proj.weight)
    stand_for_modules(target, tiny_recurrent(target, "eagle3"))
    with pytest.raises(HeadError, match="eagle3 is no multi-token-prediction module"):
        check_shape(target, {"warm_start": "mtp"})  # before prompts are answered


def test_commands_take_a_trained_module(tmp_path, capsys, monkeypatch):
    for slow in ("train.run.estimate", "profiling.read_bandwidth"):
        monkeypatch.setattr(f"dspark.{slow}", lambda *arguments, **settings: 1e10)
    folder, module, out = str(save_tiny_target(tmp_path / "target")), str(tmp_path / "module"), str(tmp_path / "head")
    target = load_target(folder)
    save_head(tiny_recurrent(target, "mtp", draft_vocab=64), target, Path(module), PROMPT, {"command": "test"}, "# card\n")
    small = ["--num-prompts", "8", "--max-answer-tokens", "12", "--held-out", "2", "--sequences", "2", "--anchors", "4", "--steps", "2"]
    command = ["train", folder, "--out", out, "--mtp", module, "--block-size", "3", "--draft-vocab", "260", *small]
    assert main(command) == 2
    assert "--mtp cannot take effect without --warm-start mtp" in capsys.readouterr().err
    assert main([*command, "--warm-start", "mtp", "--json"]) == 0
    assert f"--mtp={module}" in json.loads(capsys.readouterr().out)["command"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n')
    modes = "plain,auto,mtp@fixed,mtp+dspark@fixed"
    asked = ["bench", folder, "--prompts", str(prompts), "--compare", modes, "--head", out, "--max-new-tokens", "8", "--json"]
    assert main([*asked, "--mtp", module]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["modes"]
    assert {name: report[name]["identical_to_plain"] for name in report if name != "plain"} == dict.fromkeys(modes.split(",")[1:], 1)
    drafts, drafted = [], MtpDrafter.draft
    with monkeypatch.context() as watched:
        watched.setattr(MtpDrafter, "draft", lambda *arguments: drafts.append(drafted(*arguments)) or drafts[-1])
        assert main(["generate", folder, "a", "--head", "none", "--max-new-tokens", "8", "--mtp", module, "--plan", "fixed"]) == 0
    assert any(draft.tokens for draft in drafts)
    capsys.readouterr()
    for more, said in (
        (["--contexts", "40", "--limit", "1"], "cannot take effect with --contexts"),
        (["--compare", "plain,lookup"], "no mode drafts with it"),
    ):
        assert main([*asked, "--mtp", module, *more]) == 2
        assert said in capsys.readouterr().err
    for more, said in ((["--drafter", "dspark"], "--mtp cannot take effect with"), (["--head", module], "--mtp stands for the same")):
        assert main(["generate", folder, "a", "--mtp", module, *more]) == 2
        assert said in capsys.readouterr().err
    assert main([*asked, "--mtp", out]) == 2
    assert "cannot stand for multi-token-prediction modules" in capsys.readouterr().err
