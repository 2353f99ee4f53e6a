"""A head on disk comes back as it was, or is refused with the reason."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.errors import HeadError
from dspark.generation import generate
from dspark.head.folder import config_json, find_head, load_head, save_head
from dspark.head.head import Head
from dspark.target.target import Target
from tiny import tiny_calibration, tiny_head, tiny_model, tiny_recurrent

GOLDEN_IDS = list(range(3, 40))
KINDS = {"vanilla": ("vanilla", 8), "gated": ("gated", 8), "rnn": ("rnn", 8), "dflash": ("vanilla", 0)}


class FakeTokenizer:
    """As much of a tokenizer as a head's vocabulary check reads."""

    def __init__(self, vocabulary: dict[str, int]):
        self.vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def target_with(vocabulary: dict[str, int] | None = None, seed: int = 0, **overrides) -> Target:
    return Target(tiny_model("llama", seed, **overrides), vocabulary and FakeTokenizer(vocabulary), name="tiny")


@pytest.fixture(scope="module")
def target() -> Target:
    return target_with()


@pytest.fixture(scope="module")
def saved(target, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "head"
    save(tiny_head(target), target, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the saved head that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "head"))


def save(head: Head, target: Target, folder: Path) -> None:
    save_head(head, target, folder, GOLDEN_IDS, {"command": "test"}, "# card\n")


def draft_logits(head: Head, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Draft and confidence logits of one block after fixed tokens, from the target's features."""
    target.tap(head.config.target_layer_ids)
    features = target.score(target.start(), GOLDEN_IDS[:-1]).features_TMD[None]
    positions = torch.arange(len(GOLDEN_IDS) - 1)[None]
    with torch.no_grad():
        anchor = target.embed(torch.tensor([[GOLDEN_IDS[-1]]]))
        h = head.hidden(anchor, positions[:, -1:] + 1, head.context_kv(features, positions))
        return head(h, torch.tensor([[[5, 6, 7, 8]]])[..., : head.config.block_size])


def rounded(head: Head) -> Head:
    head.load_state_dict({name: tensor.bfloat16().float() for name, tensor in head.state_dict().items()})
    return head


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("draft_vocab", [None, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_head_computes_the_same(kind, draft_vocab, target, tmp_path):
    head = tiny_head(target, *KINDS[kind], draft_vocab=draft_vocab)
    save(head, target, tmp_path)
    loaded = load_head(tmp_path, target)
    assert loaded.config == head.config
    assert loaded.draft_ids.tolist() == head.draft_ids.tolist()
    for found, expected in zip(draft_logits(loaded, target), draft_logits(rounded(head), target), strict=True):
        assert torch.equal(found, expected)
    assert generate(target, loaded, [3, 4, 5], 8).token_ids == generate(target, None, [3, 4, 5], 8).token_ids


def test_saving_a_loaded_head_again_writes_the_same_bytes(saved, tmp_path, target):
    save(load_head(saved, target), target, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)


def test_names_and_precision_are_deepspecs(saved, target):
    tensors = load_file(saved / "model.safetensors")
    expected = {"fc.weight", "hidden_norm.weight", "norm.weight", "layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight",
                "markov_head.markov_w1.weight", "markov_head.markov_w2.weight", "confidence_head.proj.weight", "confidence_head.proj.bias"}  # fmt: skip
    assert expected <= tensors.keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((saved / "config.json").read_text())
    assert (
        config["target_layer_ids"] == list(tiny_head(target).config.target_layer_ids)
        and config["block_size"] == 4
        and config["markov_rank"] == 8
    )


def test_config_keys_keep_their_order(saved, target):
    """Files of earlier versions and of this one are the same bytes."""
    own = [key for key in json.loads((saved / "config.json").read_text()) if key not in target.text_config.to_dict()]
    before = ["head_dim"] if "head_dim" in own else []
    assert own == [*before, "rope_theta", "block_size", "mask_token_id", "target_layer_ids", "num_target_layers", "markov_rank",
                   "markov_head_type", "enable_confidence_head", "confidence_head_with_markov", "layer_types", "num_anchors", "dspark"]  # fmt: skip
    recurrent = list(config_json(tiny_recurrent(target, "eagle3").config, target))
    assert recurrent[:9] == ["hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps",
                             "rope_theta", "vocab_size", "draft_vocab_size"]  # fmt: skip


def test_deepspecs_copies_of_the_targets_rows_are_ignored(folder, target):
    copies = {name: torch.zeros(128, 32) for name in ("embed_tokens.weight", "lm_head.weight")}
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update(copies))
    load_head(folder, target)


def test_missing_extra_and_misshaped_tensors_are_named(folder, target):
    def damage(tensors):
        del tensors["fc.weight"]
        tensors["stray.weight"] = torch.zeros(2)
        tensors["norm.weight"] = torch.zeros(31)

    edit_tensors(folder / "model.safetensors", damage)
    with pytest.raises(HeadError) as caught:
        load_head(folder, target)
    for reason in ("missing fc.weight", "unexpected stray.weight", "norm.weight has shape (31,) instead of (32,)"):
        assert reason in caught.value.message


DAMAGED_CONFIGS = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no object": lambda text: "[]",
    "no block size": lambda text: text.replace('"block_size"', '"blocksize"'),
    "unknown sequential head": lambda text: text.replace('"vanilla"', '"fancy"'),
    "layers no list": lambda text: re.sub(r'"target_layer_ids": \[[^]]*\]', '"target_layer_ids": 2', text),
    "hidden size a word": lambda text: text.replace('"hidden_size": 32', '"hidden_size": "wide"'),
    "mask token outside": lambda text: text.replace('"mask_token_id": 127', '"mask_token_id": 4000'),
    "mask token a word": lambda text: text.replace('"mask_token_id": 127', '"mask_token_id": "x"'),
    "no blocks": lambda text: text.replace('"block_size": 4', '"block_size": 0'),
    "block size true": lambda text: text.replace('"block_size": 4', '"block_size": true'),
    "half a layer": lambda text: text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1.5'),
    "negative rank": lambda text: text.replace('"markov_rank": 8', '"markov_rank": -8'),
    "confidence maybe": lambda text: text.replace('"enable_confidence_head": true', '"enable_confidence_head": "maybe"'),
    "key heads that do not divide": lambda text: text.replace('"num_key_value_heads": 2', '"num_key_value_heads": 3'),
    "layers out of order": lambda text: re.sub(r'"target_layer_ids": \[[^]]*\]', '"target_layer_ids": [3, 0]', text),
    "no layers": lambda text: re.sub(r'"target_layer_ids": \[[^]]*\]', '"target_layer_ids": []', text),
    "section no object": lambda text: re.sub(r'"dspark": \{.*?\n  \}', '"dspark": 1', text, flags=re.DOTALL),
    "rope a list": lambda text: re.sub(r'"rope_parameters": \{.*?\}', '"rope_parameters": [1]', text, flags=re.DOTALL),
    "rope a word": lambda text: re.sub(r'"rope_parameters": \{.*?\}', '"rope_parameters": "x"', text, flags=re.DOTALL),
    "nested": lambda text: "[" * 100_000,
    "long number": lambda text: text.replace('"block_size": 4', '"block_size": ' + "9" * 5000),
    "wide": lambda text: text.replace('"intermediate_size": 64', f'"intermediate_size": {2**29}'),
    "wide within bounds": lambda text: text.replace('"intermediate_size": 64', f'"intermediate_size": {2**20}'),
    "rank": lambda text: text.replace('"markov_rank": 8', f'"markov_rank": {2**29}'),
    "long heads": lambda text: text.replace('"head_dim": 8', f'"head_dim": {2**29}'),
    "many layers": lambda text: text.replace('"num_hidden_layers": 2', f'"num_hidden_layers": {2**29}'),
    "long blocks": lambda text: text.replace('"block_size": 4', '"block_size": 20000'),
    "tapped layer outside": lambda text: re.sub(r'"target_layer_ids": \[[^]]*\]', '"target_layer_ids": [0, 4]', text),
}


@pytest.mark.parametrize("damage", DAMAGED_CONFIGS)
def test_damaged_configs_are_refused(damage, folder, target):
    file = folder / "config.json"
    text = file.read_text()
    file.write_text(DAMAGED_CONFIGS[damage](text))
    assert file.read_text() != text
    with pytest.raises(HeadError):
        load_head(folder, target)


def test_config_of_other_bytes_is_refused(folder, target):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(HeadError, match=r"config\.json"):
        load_head(folder, target)


@pytest.mark.parametrize("name", ["model.safetensors", "golden.safetensors"])
def test_truncated_tensors_are_refused(name, folder, target):
    data = (folder / name).read_bytes()
    for length in (0, 4, 100, len(data) - 1):
        (folder / name).write_bytes(data[:length])
        with pytest.raises(HeadError, match=name):
            load_head(folder, target)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files_are_refused(name, folder, target):
    (folder / name).unlink()
    with pytest.raises(HeadError, match=name):
        load_head(folder, target)


def test_our_own_head_without_golden_vectors_is_refused(folder, target):
    (folder / "golden.safetensors").unlink()
    with pytest.raises(HeadError, match="golden"):
        load_head(folder, target)


@pytest.mark.parametrize("name", ["ids", "features", "logits"])
def test_golden_vectors_without_a_tensor_are_refused(name, folder, target):
    edit_tensors(folder / "golden.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(HeadError, match="golden"):
        load_head(folder, target)


def test_a_changed_weight_is_refused(folder, target):
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors["layers.0.self_attn.q_proj.weight"].neg_())
    with pytest.raises(HeadError, match=r"golden vectors .* do not come out again"):
        load_head(folder, target)


def test_a_weight_that_is_no_number_is_refused(folder, target):
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors["fc.weight"].fill_(float("nan")))
    with pytest.raises(HeadError, match=r"NaN or infinity in fc\.weight"):
        load_head(folder, target)


def test_a_bias_that_golden_vectors_do_not_see_is_refused_if_it_is_no_number(folder, target):
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors["confidence_head.proj.bias"].fill_(float("nan")))
    with pytest.raises(HeadError, match=r"NaN or infinity in confidence_head\.proj\.bias"):
        load_head(folder, target)


DAMAGED_GOLDEN = {
    "ids outside": lambda golden: golden["ids"].fill_(128),
    "ids negative": lambda golden: golden["ids"].fill_(-1),
    "no ids": lambda golden: golden.update(ids=golden["ids"][:0], features=golden["features"][:0].contiguous()),
    "ids 2-D": lambda golden: golden.update(ids=golden["ids"][None]),
    "one id": lambda golden: golden.update(ids=golden["ids"][0].clone()),
    "ids floats": lambda golden: golden.update(ids=golden["ids"].float()),
    "short ids": lambda golden: golden.update(ids=golden["ids"][:5].clone()),
    "long": lambda golden: golden.update(ids=golden["ids"].repeat(20), features=golden["features"].repeat(20, 1, 1)),
    "features flat": lambda golden: golden.update(features=golden["features"].flatten(1)),
    "features whole numbers": lambda golden: golden.update(features=golden["features"].int()),
    "features NaN": lambda golden: golden["features"].fill_(float("nan")),
    "logits of another block": lambda golden: golden.update(logits=golden["logits"][:1].clone()),
    "logits NaN": lambda golden: golden["logits"].fill_(float("nan")),
    "layers a number": lambda golden: golden.update(layer_ids=torch.tensor(3)),
}


@pytest.mark.parametrize("damage", DAMAGED_GOLDEN)
def test_damaged_golden_vectors_are_refused(damage, folder, target):
    edit_tensors(folder / "golden.safetensors", DAMAGED_GOLDEN[damage])
    with pytest.raises(HeadError, match=r"golden|was trained on layers"):
        load_head(folder, target)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"hidden_size": 48}, "hidden size 32, target tiny has 48"),
        ({"num_hidden_layers": 5}, "layers 4, target tiny has 5"),
        ({"vocab_size": 160}, "vocabulary of 128, target tiny has 160"),
    ],
)
def test_targets_of_another_shape_are_refused(overrides, reason, saved):
    with pytest.raises(HeadError, match=reason):
        load_head(saved, target_with(**overrides))


def test_another_target_of_the_same_shape_is_refused(saved):
    with pytest.raises(HeadError, match=r"golden|another target"):
        load_head(saved, target_with(seed=1))


def test_a_target_whose_layers_alone_differ_is_refused(saved):
    other = target_with(seed=1)
    like = tiny_model("llama", 0)
    other.model.get_input_embeddings().load_state_dict(like.get_input_embeddings().state_dict())
    other.model.get_output_embeddings().load_state_dict(like.get_output_embeddings().state_dict())
    with pytest.raises(HeadError, match="another target than tiny"):
        load_head(saved, other)


@pytest.mark.parametrize("tap", [0, 1])
def test_a_tap_shifted_by_a_layer_is_refused(tap, folder, target):
    layer_ids = list(tiny_head(target).config.target_layer_ids)
    layer_ids[tap] += 1 if layer_ids[tap] + 1 < target.num_layers else -1
    edit_config(folder, target_layer_ids=layer_ids)
    with pytest.raises(HeadError, match="was trained on layers"):
        load_head(folder, target)


def test_another_tokenizer_is_refused(tmp_path):
    words = {f"word{i}": i for i in range(128)}
    target = target_with(words)
    save(tiny_head(target), target, tmp_path)
    load_head(tmp_path, target_with(dict(reversed(words.items()))))
    load_head(tmp_path, target_with())
    with pytest.raises(HeadError, match="another tokenizer"):
        load_head(tmp_path, target_with(words | {"word5": 6, "word6": 5}))


@pytest.mark.parametrize("draft_ids", [[0, 1, 2], [*range(31), 128], [[i] for i in range(32)]])
def test_a_draft_vocabulary_that_does_not_fit_is_refused(draft_ids, target, tmp_path):
    save(tiny_head(target, draft_vocab=32), target, tmp_path)
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.update(draft_ids=torch.tensor(draft_ids, dtype=torch.int32)))
    with pytest.raises(HeadError, match="draft_ids"):
        load_head(tmp_path, target)


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def full_after_a_few_bytes(tensors, path, metadata=None):
    Path(path).write_bytes(b"half")
    full_disk()


def text_is_cut(self, text, encoding=None):
    self.write_bytes(text[:3].encode())
    full_disk()


@pytest.mark.parametrize(
    ("place", "failure"),
    [
        ("dspark.head.folder.save_file", full_after_a_few_bytes),
        ("pathlib.Path.write_text", text_is_cut),
        ("dspark.head.folder.os.replace", full_disk),
    ],
)
def test_a_full_disk_leaves_the_previous_head(place, failure, folder, target, monkeypatch):
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(place, failure)
        with pytest.raises(HeadError, match="No space left"):
            save(tiny_head(target, seed=1), target, folder)
    assert contents(folder) == before
    load_head(folder, target)


@pytest.mark.parametrize("num_renamed", range(1, 5))
def test_a_failure_between_renames_leaves_one_whole_head(num_renamed, folder, target, monkeypatch):
    rename, calls = os.replace, []

    def stops(source, destination):
        calls.append(destination)
        if len(calls) == num_renamed + 1:
            full_disk()
        rename(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr("dspark.head.folder.os.replace", stops)
        with pytest.raises(HeadError):
            save(tiny_head(target, seed=1), target, folder)
    load_head(folder, target)


def test_a_save_puts_a_file_in_the_place_of_a_link_and_leaves_what_is_behind_it(folder, target):
    away = folder.parent / "away"
    (folder / "model.safetensors").rename(away)
    (folder / "model.safetensors").symlink_to(away)
    before = away.read_bytes()
    save(tiny_head(target, seed=3), target, folder)
    assert load_head(folder, target).state_dict().keys() and not (folder / "model.safetensors").is_symlink()
    assert away.read_bytes() == before != (folder / "model.safetensors").read_bytes()


def test_a_head_with_nan_is_not_saved(folder, target):
    before, head = contents(folder), tiny_head(target)
    head.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(HeadError, match=r"fc\.weight"):
        save(head, target, folder)
    assert contents(folder) == before


@pytest.mark.parametrize("scale", [0.0, 1e30])
def test_a_head_whose_logits_say_nothing_is_not_saved(scale, folder, target):
    before, head = contents(folder), tiny_head(target)
    head.norm.weight.data.fill_(scale)
    with pytest.raises(HeadError, match="nothing was saved: the head's logits"):
        save(head, target, folder)
    assert contents(folder) == before


def test_a_file_in_the_place_of_the_folder_is_refused(target, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HeadError, match="cannot save"):
        save(tiny_head(target), target, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_heads_are_found_by_path_and_refused_by_name(folder):
    assert find_head(folder, "tiny") == folder
    assert find_head(None, "no such target") is None
    with pytest.raises(HeadError, match="no head at"):
        find_head(str(folder / "missing"), "tiny")


def test_a_wrong_path_says_what_was_looked_for_and_where(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("dspark.target.hub.answers", lambda: False)
    for name, says in (
        ("empty", "holds no config.json"),
        ("heads/none", "is no folder, and the hub does not give it: it cannot be reached"),
        ("lost", "is no folder"),
    ):
        with pytest.raises(HeadError, match=says) as raised:
            load_head(name, target)
        assert str(tmp_path / name) in raised.value.message and "config.json and model.safetensors" in str(raised.value.hint)


class Killed(BaseException):
    """A kill, as far as one process can play it to itself."""


@pytest.mark.parametrize("num_done", range(17))
def test_a_save_that_was_killed_leaves_the_old_head_or_the_new_one(num_done, folder, target, tmp_path, monkeypatch):
    """Six files move away, a calibration among them, five move in, six old ones are deleted; the kill comes after any of these."""
    calibrated = tiny_head(target)
    calibrated.calibration = tiny_calibration(calibrated, target)
    save(calibrated, target, folder)
    save(tiny_head(target, seed=1), target, tmp_path / "new")
    before, after, calls = contents(folder), contents(tmp_path / "new"), []

    def until_killed(act):
        def counted(*args):
            if len(calls) == num_done:
                raise Killed
            calls.append(args)
            return act(*args)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr("dspark.head.folder.os.replace", until_killed(os.replace))
        patch.setattr("pathlib.Path.unlink", until_killed(Path.unlink))
        with pytest.raises(Killed):
            save(tiny_head(target, seed=1), target, folder)
    load_head(folder, target)
    assert {name: data for name, data in contents(folder).items() if name in before} == (before if num_done < 11 else after)
    save(tiny_head(target, seed=1), target, folder)
    assert contents(folder) == after


def test_what_an_old_save_left_never_replaces_a_good_head(folder, target):
    before = contents(folder)
    for name in before:
        (folder / f"{name}.old").write_bytes(b"stale")
    (folder / "notes.old").write_text("mine")
    (folder / "README.md").unlink()
    load_head(folder, target)
    del before["README.md"]
    assert contents(folder) == before | {"notes.old": b"mine"}
