"""Heads travel: what is written reads back bit for bit, what a format cannot hold is refused, other conventions do not slip in."""

import contextlib
import json
import shutil
import struct
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.errors import HeadError, SettingError
from dspark.formats import gguf_file
from dspark.formats.convert import FORMATS, convert, detect, read_own
from dspark.head import golden
from dspark.head.folder import load_head, read_config, save_head
from dspark.target.load import load_target
from dspark.target.target import Target
from saved import byte_tokenizer, run, save_tiny_pair
from tiny import tiny_calibration, tiny_head, tiny_model

# ranks, kinds and draft vocabularies of a target with 128 tokens; what each format holds of them
HEADS = {"vanilla": ("vanilla", 8, None), "gated": ("gated", 8, None), "rnn": ("rnn", 8, None), "dflash": ("vanilla", 0, None),
         "reduced": ("vanilla", 8, 32), "gated reduced": ("gated", 8, 32)}  # fmt: skip
HELD = {
    "deepspec": ("vanilla", "gated", "rnn", "dflash"),
    "specforge": ("vanilla", "gated", "rnn", "dflash"),
    "speculators": tuple(HEADS),
    "gguf": ("vanilla", "reduced"),
}
REFUSED = {
    ("deepspec", "reduced"): "no reduced draft vocabulary, and this head drafts 32 of 128",
    ("specforge", "reduced"): "no reduced draft vocabulary, and this head drafts 32 of 128",
    ("gguf", "gated"): "a gated sequential head",
    ("gguf", "rnn"): "a rnn sequential head",
    ("gguf", "dflash"): "without a sequential head",
}
FOLDERS = [name for name in FORMATS if name != "gguf"]


@pytest.fixture(scope="module", autouse=True)
def short_golden_text():
    """Random heads draft nothing on the golden text: eight tokens of it say as much."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(golden, "TEXT_TOKENS", 8)
        yield


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_model("llama", 0), None, name="tiny")


@pytest.fixture(scope="module")
def heads(target, tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind of head, one of them calibrated."""
    root = tmp_path_factory.mktemp("heads")
    for name, (kind, rank, draft_vocab) in HEADS.items():
        head = tiny_head(target, kind, rank, draft_vocab=draft_vocab)
        head.calibration = tiny_calibration(head, target) if name == "vanilla" else None
        save_head(head, target, root / name, list(range(3, 40)), {"command": "test"}, f"# card of {name}\n")
    return {name: root / name for name in HEADS}


def travel(source: Path, to: str, path: Path, target: Target, kind: str | None = None) -> Path:
    convert(source, kind or detect(source), to, path, target, "dspark convert", lambda text: None)
    return path


@pytest.fixture
def exported(heads, target, tmp_path):
    """A function that exports one of the heads for a test to damage."""
    return lambda to, name="vanilla": travel(heads[name], to, tmp_path / f"{to}.out", target)


def edit_config(folder: Path, change) -> None:
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def without_memory(folder: Path) -> Path:
    """The folder as another project would have made it: without what dspark wrote for itself."""
    shutil.rmtree(folder / "dspark", ignore_errors=True)
    edit_config(folder, lambda raw: raw.pop("dspark"))
    return folder


# --- there and back


@pytest.mark.parametrize(("to", "name"), [(to, name) for to, held in HELD.items() for name in held])
def test_a_head_comes_back_bit_for_bit(to, name, heads, target, tmp_path):
    there = travel(heads[name], to, tmp_path / "there", target)
    assert detect(there) == to
    back = travel(there, "dspark", tmp_path / "back", target)
    assert (back / "model.safetensors").read_bytes() == (heads[name] / "model.safetensors").read_bytes()
    found, expected = read_config(back)[0], read_config(heads[name])[0]
    if name == "dflash":  # without a sequential head nobody can read the previous token
        expected = type(expected)(**expected.__dict__ | {"confidence_head_with_markov": found.confidence_head_with_markov})
    if to == "gguf":
        assert found.rms_norm_eps == pytest.approx(expected.rms_norm_eps)
        expected = type(expected)(**expected.__dict__ | {"rms_norm_eps": found.rms_norm_eps})
    assert found == expected
    load_head(back, target)


@pytest.mark.parametrize("to", FOLDERS)
def test_golden_vectors_calibration_and_card_travel_along(to, heads, target, tmp_path):
    there = travel(heads["vanilla"], to, tmp_path / "there", target)
    assert not (there / "golden.safetensors").exists()  # other loaders take every *.safetensors for weights
    back = travel(there, "dspark", tmp_path / "back", target)
    for name in ("golden.safetensors", "calibration.json", "README.md"):
        assert (back / name).read_bytes() == (heads["vanilla"] / name).read_bytes()
    assert json.loads((back / "provenance.json").read_text())["converted"]["converted_from"] == to
    assert load_head(back, target).calibration == load_head(heads["vanilla"], target).calibration


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("to", FORMATS)
def test_other_precisions_are_kept(to, dtype, heads, target, tmp_path):
    source = Path(shutil.copytree(heads["vanilla"], tmp_path / "source"))
    edit_tensors(source, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    there = travel(source, to, tmp_path / "there", target)
    back = travel(there, "dspark", tmp_path / "back", target)
    expected, found = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_a_head_goes_from_one_foreign_format_to_another(heads, target, tmp_path):
    one = travel(heads["vanilla"], "speculators", tmp_path / "one", target)
    two = travel(one, "gguf", tmp_path / "two.gguf", target)
    three = travel(two, "deepspec", tmp_path / "three", target)
    back = travel(three, "dspark", tmp_path / "back", target)
    assert (back / "model.safetensors").read_bytes() == (heads["vanilla"] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("to", FOLDERS)
def test_a_folder_of_another_project_gets_golden_vectors(to, exported, target, tmp_path):
    back = travel(without_memory(exported(to)), "dspark", tmp_path / "back", target)
    head = load_head(back, target)
    assert head.self_test is not None and head.self_test.tokens == 8


def test_a_deepspec_folder_loads_as_it_is(exported, target):
    folder = exported("deepspec")
    assert load_head(folder, target).self_test is not None
    assert load_head(without_memory(folder), target).self_test is None


def test_shards_are_read(exported, heads, target, tmp_path):
    folder = exported("deepspec")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / file)
    places = {name: file for file, some in parts.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    back = travel(folder, "dspark", tmp_path / "back", target)
    assert (back / "model.safetensors").read_bytes() == (heads["vanilla"] / "model.safetensors").read_bytes()
    save_file({name: tensors[name] for name in parts["b.safetensors"][1:]}, folder / "b.safetensors")
    with pytest.raises(HeadError, match=rf"b\.safetensors lacks {names[1]}"):
        travel(folder, "dspark", tmp_path / "again", target)
    (folder / "b.safetensors").unlink()
    with pytest.raises(HeadError, match=r"b\.safetensors"):
        travel(folder, "dspark", tmp_path / "again", target)


# --- what a format cannot hold


@pytest.mark.parametrize(("to", "name"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_by_name(to, name, heads, target, tmp_path):
    with pytest.raises(HeadError) as caught:
        travel(heads[name], to, tmp_path / "there", target)
    assert REFUSED[to, name] in caught.value.message and "hold it" in (caught.value.hint or "")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("to", FORMATS)
def test_a_target_that_scales_its_embeddings(to, tmp_path):
    target = Target(tiny_model("gemma3", 0), None, name="scaled")
    head = tiny_head(target)
    save_head(head, target, tmp_path / "head", list(range(3, 20)), {}, "")
    if to in ("speculators", "specforge"):
        with pytest.raises(HeadError, match=r"raw, and scaled scales them by 5\.66"):
            travel(tmp_path / "head", to, tmp_path / "there", target)
        return
    there = travel(tmp_path / "head", to, tmp_path / "there", target)
    assert travel(there, "dspark", tmp_path / "back", target)
    if to == "deepspec":  # its layers take what is in the file
        rows = load_file(there / "model.safetensors")["embed_tokens.weight"].float()
        assert torch.allclose(rows, target.embed(torch.arange(128)), rtol=0.01)


def test_a_tap_that_llama_cpp_does_not_give_is_told(heads, target, tmp_path):
    said: list[str] = []
    convert(heads["vanilla"], "dspark", "gguf", tmp_path / "there", target, "", said.append)
    assert len(said) == 1 and "last layer, 3" in said[0]


def test_a_converted_head_may_read_other_layers(heads, target, tmp_path):
    source, said = heads["vanilla"], []
    before = load_head(source, target)
    count = len(before.config.target_layer_ids)
    taps = tuple(range(count)) if before.config.target_layer_ids != tuple(range(count)) else tuple(range(1, count + 1))
    convert(source, "dspark", "gguf", tmp_path / "there", target, "", said.append, taps)
    convert(tmp_path / "there", "gguf", "dspark", tmp_path / "back", target, "", said.append)
    assert "brought no golden vectors" in said[-1]
    convert(source, "dspark", "dspark", tmp_path / "own", target, "", said.append, taps)
    assert not any("last layer" in word for word in said) or taps[-1] == target.num_layers - 1
    for name in ("back", "own"):
        after = load_head(tmp_path / name, target)
        assert after.config.target_layer_ids == taps and after.self_test is not None
        assert all(torch.equal(tensor, after.state_dict()[key]) for key, tensor in before.state_dict().items())
    for wrong in (taps[1:], taps[::-1], (*taps[:-1], target.num_layers)):
        with pytest.raises(SettingError, match=f"the head reads {count} layers of"):
            convert(source, "dspark", "gguf", tmp_path / "wrong", target, "", said.append, wrong)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("form", ["dspark", *FORMATS])
def test_taps_that_the_files_of_a_head_refuse_are_told_before_the_target_is_loaded(form, heads, exported, tmp_path, capsys):
    source = heads["vanilla"] if form == "dspark" else exported(form)
    own = read_config(heads["vanilla"])[0].target_layer_ids
    count, last = len(own), "" if form == "speculators" else " of 4"  # its files do not say how many layers the target has
    asked = ["convert", source, tmp_path / "new", "--to", "dspark" if form == "gguf" else "gguf", "--target", "/nowhere/target"]
    right = ",".join(map(str, own))
    high = ",".join(map(str, (*own[:-1], 4)))
    for taps in (right + ",9", right[::-1], f"-1{right[1:]}", *[high] * bool(last)):
        code, out, err = run(capsys, *asked, f"--taps={taps}")
        assert code == 2 and out == "" and f"--taps is {taps}; the head reads {count} layers{last}, in ascending order" in err
        assert err.endswith(f"it reads {right} now\n")
    assert "no folder /nowhere/target" in run(capsys, *asked, f"--taps={right}")[2]
    (tmp_path / "new").write_text("")
    assert f"{tmp_path / 'new'} exists already" in run(capsys, *asked)[2]


FOREIGN_LAYERS = {
    "sliding_attention": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}},
    "attention_bias": {"attention_bias": True},
    "gelu": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("reason", FOREIGN_LAYERS)
@pytest.mark.parametrize("to", FOLDERS)
def test_layers_that_dspark_does_not_run_are_refused(to, reason, exported, target, tmp_path):
    folder = without_memory(exported(to))
    edit_config(folder, lambda raw: raw.get("transformer_layer_config", raw).update(FOREIGN_LAYERS[reason]))
    with pytest.raises(HeadError, match=reason):
        travel(folder, "dspark", tmp_path / "back", target)


# --- conventions that differ (each of these gives plausible text and bad drafts)


def test_layer_numbers_start_where_each_format_says(exported, heads):
    assert read_config(heads["vanilla"])[0].target_layer_ids == (0, 3)

    def config(to):
        return json.loads((exported(to) / "config.json").read_text())

    assert config("deepspec")["target_layer_ids"] == config("specforge")["dflash_config"]["target_layer_ids"] == [0, 3]
    assert config("speculators")["aux_hidden_state_layer_ids"] == [1, 4]
    assert gguf_file.read_file(exported("gguf"))[0]["dflash.target_layers"] == [1, 4]


def test_layer_numbers_of_another_convention_are_refused(exported, target, tmp_path):
    spec, deep = exported("speculators"), exported("deepspec")
    edit_config(spec, lambda raw: raw.update(aux_hidden_state_layer_ids=[0, 3]))  # DeepSpec's
    with pytest.raises(HeadError, match=r"was trained on layers \[0, 3\], its config names \[-1, 2\]"):
        travel(spec, "dspark", tmp_path / "a", target)
    edit_config(without_memory(deep), lambda raw: raw.update(target_layer_ids=[1, 4]))  # speculators'
    with pytest.raises(HeadError, match="not all layers of a target with 4") as caught:
        travel(deep, "dspark", tmp_path / "b", target)
    assert "one higher" in (caught.value.hint or "")


def test_layer_numbers_that_are_not_given_are_the_librarys_default(exported, target, tmp_path):
    folder = without_memory(exported("speculators"))
    edit_config(folder, lambda raw: raw.pop("aux_hidden_state_layer_ids"))
    with pytest.raises(HeadError, match=r"ascending layer numbers"):  # 2, 2 and 1 of four layers
        travel(folder, "dspark", tmp_path / "back", target)


def test_a_missing_sample_from_anchor_is_false_in_speculators(exported, target, tmp_path):
    folder = exported("speculators")
    edit_config(folder, lambda raw: raw.pop("sample_from_anchor"))
    with pytest.raises(HeadError, match="sample_from_anchor is absent, which means false"):
        travel(folder, "dspark", tmp_path / "back", target)
    edit_config(folder, lambda raw: raw.update(sample_from_anchor=False))
    with pytest.raises(HeadError, match="sample_from_anchor is false"):
        travel(folder, "dspark", tmp_path / "back", target)


def test_a_missing_sample_from_anchor_is_true_in_gguf(exported, heads, target, tmp_path):
    data = (exported("gguf")).read_bytes()
    key = b"dflash.sample_from_anchor"
    absent, false = tmp_path / "absent.gguf", tmp_path / "false.gguf"
    absent.write_bytes(data.replace(key, b"dflash.sample_from_anchoz"))
    false.write_bytes(data.replace(key + struct.pack("<IB", 7, 1), key + struct.pack("<IB", 7, 0)))
    back = travel(absent, "dspark", tmp_path / "back", target)
    assert (back / "model.safetensors").read_bytes() == (heads["vanilla"] / "model.safetensors").read_bytes()
    with pytest.raises(HeadError, match="sample_from_anchor is false"):
        travel(false, "dspark", tmp_path / "again", target)


def test_target_ids_where_speculators_has_offsets_are_refused(exported, target, tmp_path):
    folder = exported("speculators", "reduced")
    edit_tensors(folder, lambda tensors: tensors.update(d2t=tensors["d2t"] + torch.arange(32)))
    with pytest.raises(HeadError, match="d2t holds target ids, this format has offsets"):
        travel(folder, "dspark", tmp_path / "back", target)


def test_offsets_where_gguf_has_target_ids_are_refused(heads, target, tmp_path):
    head = read_own(heads["reduced"])
    head.draft_ids = torch.tensor([*range(16), *range(100, 116)]) - torch.arange(32)
    gguf_file.write(head, tmp_path / "offsets.gguf", target, "")
    with pytest.raises(HeadError, match="target ids in d2t do not ascend") as caught:
        travel(tmp_path / "offsets.gguf", "dspark", tmp_path / "back", target)
    assert "offsets" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["t2d", "d2t"])
def test_half_a_vocabulary_mapping_is_refused(name, exported, target, tmp_path):
    folder = exported("speculators", "reduced")
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(HeadError, match=f"lacks {name}"):
        travel(folder, "dspark", tmp_path / "back", target)


def test_keys_equal_to_the_librarys_defaults_may_be_absent(exported, heads, target, tmp_path):
    from transformers import Qwen3Config

    folder = exported("speculators")
    usual = Qwen3Config().to_dict() | {"rope_theta": 10000.0}
    dropped: list[str] = []

    def drop(raw):
        layers = raw["transformer_layer_config"]
        dropped.extend(key for key in layers if layers[key] == usual.get(key, ...))
        for key in dropped:
            del layers[key]

    edit_config(folder, drop)
    assert {"rms_norm_eps", "rope_parameters", "rope_theta", "hidden_act", "model_type"} <= set(dropped)
    back = travel(folder, "dspark", tmp_path / "back", target)
    assert read_config(back)[0] == read_config(heads["vanilla"])[0]


def test_a_partly_rotated_head_is_refused(exported, target, tmp_path):
    folder = exported("speculators")
    edit_config(folder, lambda raw: raw["transformer_layer_config"]["rope_parameters"].update(partial_rotary_factor=0.5))
    with pytest.raises(HeadError, match="partial_rotary_factor"):
        travel(folder, "dspark", tmp_path / "back", target)


def test_features_tapped_after_the_final_norm_are_refused(heads, target, tmp_path):
    """As in transformers' `hidden_states[-1]`: the direction is nearly that of the residual stream."""
    folder = Path(shutil.copytree(heads["vanilla"], tmp_path / "head"))
    stored = load_file(folder / "golden.safetensors")
    head = load_head(folder, target)
    stored["features"][:, 1] = target.model.model.norm(stored["features"][:, 1].float()).to(torch.bfloat16)
    block = golden.last_block(head, target, stored["ids"].tolist(), stored["features"])
    assert len(head.draft_ids) <= golden.COLUMNS
    with torch.no_grad():
        context = head.context(stored["features"][None].float())[0, -1]
    stored |= {"hidden": block.hidden_GD.half(), "logits": block.logits_GV.half(), "draft": torch.tensor(block.tokens).int(),
               "confidences": block.confidences_G, "context": context.half()}  # fmt: skip
    save_file(stored, folder / "golden.safetensors")
    with pytest.raises(HeadError, match="another target than tiny: features of layer 3"):
        load_head(folder, target)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight"])
def test_rows_that_are_not_the_targets_are_refused(name, exported, target, tmp_path):
    folder = exported("deepspec")
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].roll(1, 0)}))
    with pytest.raises(HeadError, match=f"{name} differs from the target's own rows"):
        travel(folder, "dspark", tmp_path / "back", target)


def test_the_old_names_of_specforges_markov_head_are_read(exported, heads, target, tmp_path):
    folder = exported("specforge")
    edit_tensors(
        folder, lambda t: t.update({n.replace("markov_head.", "logit_head."): t.pop(n) for n in list(t) if n.startswith("markov_")})
    )
    back = travel(folder, "dspark", tmp_path / "back", target)
    assert (back / "model.safetensors").read_bytes() == (heads["vanilla"] / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "change", [{"causal": True}, {"attention_mode": "mla"}, {"attention_modes": ["gqa", "kda"]}, {"sample_from_anchor": False}]
)
def test_other_blocks_of_specforge_are_refused(change, exported, target, tmp_path):
    folder = exported("specforge")
    edit_config(folder, lambda raw: raw["dflash_config"].update(change))
    with pytest.raises(HeadError, match=r"causal|attention of kind|sample_from_anchor is false"):
        travel(folder, "dspark", tmp_path / "back", target)


# --- files that are not whole


@pytest.mark.parametrize("to", FOLDERS)
def test_missing_extra_and_misshaped_tensors_are_named(to, exported, target, tmp_path):
    def damage(tensors):
        del tensors["fc.weight"]
        tensors["stray.weight"] = torch.zeros(2)
        tensors["norm.weight"] = torch.zeros(31)

    folder = without_memory(exported(to))
    edit_tensors(folder, damage)
    with pytest.raises(HeadError) as caught:
        travel(folder, "dspark", tmp_path / "back", target)
    for reason in ("missing fc.weight", "unexpected stray.weight", "norm.weight has shape (31,) instead of (32,)"):
        assert reason in caught.value.message


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_gguf_file_with_other_tensors_is_refused(change, heads, target, tmp_path, monkeypatch):
    theirs = dict(gguf_file.NAMES)
    if change == "missing":
        monkeypatch.setitem(gguf_file.NAMES, "fc.weight", "fd.weight")
    head = read_own(heads["vanilla"])
    gguf_file.write(head, tmp_path / "odd.gguf", target, "")
    for name, there in theirs.items():
        monkeypatch.setitem(gguf_file.NAMES, name, there if change == "missing" or name != "norm.weight" else "elsewhere")
    with pytest.raises(HeadError, match=r"missing fc\.weight; unexpected fd\.weight" if change == "missing" else r"unexpected output_norm"):
        travel(tmp_path / "odd.gguf", "dspark", tmp_path / "back", target)


@pytest.mark.parametrize("to", FORMATS)
def test_truncated_files_are_refused(to, exported, target, tmp_path):
    there = exported(to)
    file = there if to == "gguf" else there / "model.safetensors"
    data = file.read_bytes()
    for share in (0.0, 0.01, 0.5, 0.999):
        file.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(HeadError):
            travel(there, "dspark", tmp_path / "back", target, kind=to)
        assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("to", FORMATS)
def test_a_number_that_is_none_is_refused(to, heads, target, tmp_path):
    head = read_own(heads["vanilla"])
    head.weights["fc.weight"] = head.weights["fc.weight"].clone().fill_(float("nan"))
    FORMATS[to].write(head, tmp_path / "there", target, "")
    with pytest.raises(HeadError, match=r"NaN or infinity in fc\.weight"):
        travel(tmp_path / "there", "dspark", tmp_path / "back", target, kind=to)


@pytest.mark.parametrize("to", FOLDERS)
def test_a_changed_weight_is_refused_by_the_golden_vectors(to, exported, target, tmp_path):
    folder = exported(to)
    edit_tensors(folder, lambda tensors: tensors["layers.0.self_attn.q_proj.weight"].neg_())
    with pytest.raises(HeadError, match=r"first in the hidden state of drafted token 1"):
        travel(folder, "dspark", tmp_path / "back", target)


def test_a_changed_weight_of_a_gguf_file_is_refused_if_dspark_wrote_it(exported, target, tmp_path):
    there = exported("gguf")
    data = bytearray(there.read_bytes())
    data[-1000] ^= 1
    there.write_bytes(data)
    with pytest.raises(HeadError, match="not those that `dspark convert` wrote"):
        travel(there, "dspark", tmp_path / "back", target)


@pytest.mark.parametrize("seed", range(4))
def test_bytes_changed_at_random_in_a_gguf_file_end_in_one_clear_error(seed, exported, target, tmp_path):
    there, random = exported("gguf"), Random(seed)
    data = there.read_bytes()
    for _ in range(20):
        changed = bytearray(data)
        for _ in range(random.choice([1, 3, 30])):
            changed[random.randrange(min(len(changed), 12_000))] = random.randrange(256)
        there.write_bytes(changed)
        with contextlib.suppress(HeadError):
            gguf_file.read(there, target)


def test_a_quantised_gguf_file_is_refused(exported, target, tmp_path):
    import gguf

    writer = gguf.GGUFWriter(None, "dflash")
    writer.add_tensor(
        "fc.weight",
        gguf.quants.quantize(torch.zeros(4, 32).numpy(), gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.write_header_to_file(tmp_path / "q.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(HeadError, match=r"quantised .Q8_0."):
        travel(tmp_path / "q.gguf", "dspark", tmp_path / "back", target)


DAMAGED = {
    "no layers": ("speculators", lambda raw: raw.pop("transformer_layer_config")),
    "layers a word": ("speculators", lambda raw: raw.update(transformer_layer_config="x")),
    "hidden size a word": ("speculators", lambda raw: raw["transformer_layer_config"].update(hidden_size="wide")),
    "no mask token": ("speculators", lambda raw: raw.pop("mask_token_id")),
    "no draft vocabulary": ("speculators", lambda raw: raw.pop("draft_vocab_size")),  # the library's 32,000
    "taps a word": ("speculators", lambda raw: raw.update(aux_hidden_state_layer_ids="x")),
    "another speculator": ("speculators", lambda raw: raw.update(speculators_model_type="eagle3")),
    "inner a word": ("specforge", lambda raw: raw.update(dflash_config="x")),
    "no taps": ("specforge", lambda raw: raw["dflash_config"].pop("target_layer_ids")),
    "no block size": ("specforge", lambda raw: raw.pop("block_size")),
    "another architecture": ("deepspec", lambda raw: raw.update(architectures=["Gemma4DSparkModel"])),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_configs_are_refused(damage, exported, target, tmp_path):
    to, change = DAMAGED[damage]
    folder = without_memory(exported(to))
    edit_config(folder, change)
    with pytest.raises(HeadError):
        travel(folder, "dspark", tmp_path / "back", target)


def test_a_full_disk_leaves_nothing(heads, target, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dspark.formats.portable.os.replace", full)
    for to in FORMATS:
        with pytest.raises(HeadError, match="No space left"):
            travel(heads["vanilla"], to, tmp_path / "there", target)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_overwritten(heads, target, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("x")
    with pytest.raises(HeadError, match="exists already"):
        travel(heads["vanilla"], "speculators", tmp_path / "there", target)
    assert (tmp_path / "there" / "mine").read_text() == "x"


# --- the command line


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny target that has a tokenizer, and a head for it."""
    return save_tiny_pair(tmp_path_factory.mktemp("place"))


def test_convert_there_and_back(place, capsys, tmp_path):
    code, out, err = run(capsys, "convert", place / "head", tmp_path / "there.gguf", "--to", "gguf")
    assert (code, out) == (0, f"{tmp_path / 'there.gguf'}\n") and "draft accepted" in err
    keys, _ = gguf_file.read_file(tmp_path / "there.gguf")
    assert keys["tokenizer.ggml.mask_token_id"] == len(byte_tokenizer()) - 1 and keys["tokenizer.ggml.bos_token_id"] == 256
    code, _, err = run(capsys, "convert", tmp_path / "there.gguf", "--out", tmp_path / "back")  # the target is named in the file
    assert code == 0 and "on the golden text" in err
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (place / "head" / "model.safetensors").read_bytes()


def test_convert_says_what_it_needs(place, capsys, tmp_path):
    code, _, err = run(capsys, "convert", place / "head", "--to", "gguf")
    assert code == 2 and "one place to write is needed" in err
    code, _, err = run(capsys, "convert", place / "head", tmp_path / "x")
    assert code == 2 and "in the format dspark already" in err
    travel(place / "head", "deepspec", tmp_path / "deep", load_target(place / "target"))
    code, _, err = run(capsys, "convert", without_memory(tmp_path / "deep"), tmp_path / "x")
    assert code == 2 and "does not name its target" in err
    (tmp_path / "config.json").write_text("{}")
    code, _, err = run(capsys, "convert", tmp_path, tmp_path / "x")
    assert code == 2 and "of no known format" in err
    (tmp_path / "a.bin").write_bytes(b"abcd")
    code, _, err = run(capsys, "convert", tmp_path / "a.bin", tmp_path / "x")
    assert code == 2 and "no GGUF file" in err


@pytest.mark.parametrize("to", ["speculators", "specforge"])
def test_loading_another_format_says_how_to_convert_it(to, exported, target):
    with pytest.raises(HeadError) as caught:
        load_head(exported(to), target)
    assert "dspark convert" in (caught.value.hint or "")


# --- another project's own classes


@pytest.mark.parametrize("name", ["vanilla", "gated", "rnn", "dflash", "reduced"])
def test_the_speculators_library_computes_the_same(name, heads, tmp_path):
    pytest.importorskip("speculators")
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "bench" / "peers"))
    from speculators_check import TOLERANCE, differences

    model = tiny_model("llama", 0)
    model.save_pretrained(tmp_path / "target")
    found = differences(read_own(heads[name]), Target(model, None, name="tiny"), tmp_path / "target")
    assert set(found) == {"logits", "confidences"} and max(found.values()) < TOLERANCE
