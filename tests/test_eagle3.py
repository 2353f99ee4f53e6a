"""EAGLE-3 heads of other projects: read as they are, and what dspark would compute otherwise is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.drafters import MtpDrafter
from dspark.errors import HeadError, SettingError
from dspark.formats.convert import convert, detect
from dspark.generation import generate
from dspark.head.folder import load_head
from dspark.target.load import load_target
from dspark.target.target import Target
from oracle import plain_greedy
from saved import run, save_tiny_target
from test_recurrent import committed, laws_along
from tiny import tiny_model, tiny_recurrent

PROMPT = [3, 17, 99, 45, 8, 8, 101, 64]
LAYERS = 8  # of the target: enough for the layers that engines take where a head names none


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_model("llama", num_hidden_layers=LAYERS), name="tiny")


def layer_config(head) -> dict:
    """What SpecForge's config.json says of the layer."""
    config = head.config
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "rope_theta",
             "vocab_size")  # fmt: skip
    return {name: getattr(config, name) for name in names} | {
        "num_hidden_layers": 1, "hidden_act": "silu", "attention_bias": False, "rope_scaling": None, "model_type": "llama",
    }  # fmt: skip


def tensors_of(head) -> dict[str, torch.Tensor]:
    ids = head.draft_ids
    t2d = torch.zeros(head.config.vocab_size, dtype=torch.bool)
    t2d[ids] = True
    return {name: tensor.detach().clone() for name, tensor in head.state_dict().items()} | {"d2t": ids - torch.arange(len(ids)), "t2d": t2d}


def write(folder: Path, raw: dict, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return folder


def specforge(folder: Path, head, taps: list[int] | None = None, **more) -> Path:
    raw = layer_config(head) | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": head.config.draft_vocab_size}
    raw |= {"eagle_config": {"eagle_aux_hidden_state_layer_ids": taps, "use_aux_hidden_state": True}} if taps else {}
    return write(folder, raw | more, tensors_of(head))


def speculators(folder: Path, head, taps: list[int]) -> Path:
    raw = {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "norm_before_residual": False,
        "transformer_layer_config": layer_config(head), "draft_vocab_size": head.config.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": [tap + 1 for tap in taps],  # there 0 is the embeddings
    }  # fmt: skip
    return write(folder, raw, {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors_of(head).items()})


def first_ones(folder: Path, head) -> Path:
    """As EAGLE's authors published theirs: a Llama by name, pickled, without layer numbers."""
    raw = layer_config(head) | {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": head.config.draft_vocab_size}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    torch.save(tensors_of(head), folder / "pytorch_model.bin")
    return folder


def brought_in(source: Path, target: Target, path: Path):
    convert(source, detect(source), "dspark", path, target, "dspark convert", lambda text: None)
    return load_head(path, target)


USUAL = (1, LAYERS // 2 - 1, LAYERS - 4)
WRITERS = {
    "specforge": lambda folder, head: specforge(folder, head, list(head.layer_ids)),
    "specforge, usual layers": specforge,
    "speculators": lambda folder, head: speculators(folder, head, list(head.layer_ids)),
    "first ones": first_ones,
}


@pytest.mark.parametrize("draft_vocab", [None, 64])
@pytest.mark.parametrize("layout", WRITERS)
def test_a_foreign_head_drafts_what_it_drafted(layout, draft_vocab, target, tmp_path):
    usual = layout in ("specforge, usual layers", "first ones")
    head = tiny_recurrent(target, "eagle3", 5, draft_vocab, layer_ids=USUAL if usual else (0, 5, 7))
    for parameter in head.parameters():  # as the file has them
        parameter.data = parameter.data.bfloat16().float()
    source = WRITERS[layout](tmp_path / "source", head)
    assert detect(source) == "eagle3"
    found = brought_in(source, target, tmp_path / "out")
    assert found.layer_ids == head.layer_ids and found.block_size == 5 and torch.equal(found.draft_ids, head.draft_ids)
    tokens = [4, 8, 12, 64, 2]
    laws = [laws_along(committed(MtpDrafter(each, target), PROMPT), PROMPT, tokens) for each in (found, head)]
    assert (laws[0] - laws[1]).abs().max() < 1e-5
    result = generate(target, found, PROMPT, 20, plan="fixed")
    assert result.token_ids == plain_greedy(target, PROMPT, 20) and sum(done.num_drafted for done in result.rounds_log)


def test_layers_counted_otherwise_give_other_laws(target, tmp_path):
    """The control: were the numbers of speculators taken for SpecForge's, the draft would be another."""
    head = tiny_recurrent(target, "eagle3", 5, layer_ids=(0, 3, 6))
    right = brought_in(speculators(tmp_path / "a", head, [0, 3, 6]), target, tmp_path / "a.out")
    wrong = brought_in(specforge(tmp_path / "b", head, [1, 4, 7]), target, tmp_path / "b.out")
    laws = [laws_along(committed(MtpDrafter(each, target), PROMPT), PROMPT, [4, 8]) for each in (right, wrong)]
    assert (laws[0] - laws[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fc_norm": True}, "a norm before its layers meet"),
        ({"norm_output": True}, "a norm of the state that it hands on"),
        ({"norm_before_residual": True}, "the norm before the residual"),
        ({"target_hidden_size": 64}, "states of another size"),
        ({"num_hidden_layers": 2, "architectures": ["LlamaForCausalLMEagle3"]}, "2 layers"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "positions scaled by 'llama3'"),
        ({"attention_bias": True}, "biases in its attention"),
        ({"hidden_size": 64}, "was trained for hidden size 64"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 90]}},
            "eagle_aux_hidden_state_layer_ids is .*not all layers of a target with 8",
        ),
        ({"eagle_config": 3}, "an object was expected"),
        ({"num_attention_heads": None}, "lacks num_attention_heads"),
        ({"draft_vocab_size": 64}, "t2d .* and d2t .* do not fit 64 of 128"),
        ({"transformer_layer_config": [1]}, "an object was expected"),
        ({"rope_parameters": "linear"}, "an object was expected"),
        ({"rope_theta": [1e4]}, "rope_theta is"),
        ({"rope_theta": "fast"}, "rope_theta is"),
        ({"rope_theta": 10**400}, "rope_theta is"),
        ({"hidden_size": "32", "head_dim": None}, "head_dim|hidden_size"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": ["1", "3", "4"]}}, "a list of layer numbers was expected"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [True, 3, 4]}}, "a list of layer numbers was expected"),
        ({"eagle_aux_hidden_state_layer_ids": {"1": 3}}, "a list of layer numbers was expected"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": []}}, "are not ascending layer numbers"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 4]}}, "fc.weight has shape"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3, 4]}}, "fc.weight has shape"),
    ],
)
def test_what_dspark_does_not_compute_is_refused(change, says, target, tmp_path):
    source = specforge(tmp_path / "source", tiny_recurrent(target, "eagle3", layer_ids=USUAL), **change)
    with pytest.raises(HeadError, match=says):
        brought_in(source, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("fc.weight"), "missing fc.weight"),
        (lambda t: t.update({"midlayer.extra.weight": torch.zeros(3)}), "unexpected midlayer.extra.weight"),
        (lambda t: t["norm.weight"].fill_(float("nan")), "NaN or infinity in norm.weight"),
        (lambda t: t.update({"embed_tokens.weight": torch.randn(128, 32)}), "embed_tokens.weight differs from the target's"),
        (lambda t: t.update({"d2t": t["d2t"] + torch.arange(64)}), "d2t holds target ids"),
        (lambda t: t.pop("t2d"), "lacks t2d"),
        (lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.float8_e4m3fn)}), "fc.weight is of the type torch.float8"),
        (lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.int8)}), "fc.weight is of the type torch.int8"),
    ],
)
def test_damaged_tensors_are_refused(change, says, target, tmp_path):
    source = specforge(tmp_path / "source", tiny_recurrent(target, "eagle3", draft_vocab=64, layer_ids=USUAL))
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(HeadError, match=says):
        brought_in(source, target, tmp_path / "out")


def test_a_copy_of_the_targets_embeddings_may_come_along(target, tmp_path):
    source = specforge(tmp_path / "source", tiny_recurrent(target, "eagle3", layer_ids=USUAL))
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"model.embed_tokens.weight": target.model.get_input_embeddings().weight.detach()}, source / "model.safetensors")
    assert brought_in(source, target, tmp_path / "out").kind == "eagle3"


def test_a_pickle_that_is_more_than_tensors_is_refused(target, tmp_path):
    source = first_ones(tmp_path / "source", tiny_recurrent(target, "eagle3", layer_ids=USUAL))
    torch.save({"fc.weight": Path("x")}, source / "pytorch_model.bin")
    with pytest.raises(HeadError, match=r"cannot read .*pytorch_model\.bin"):
        brought_in(source, target, tmp_path / "out")


class Hostile:
    """What would run a command at load, were it let."""

    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"PK", {"fc.weight": Hostile()}, [torch.zeros(3)], {"state_dict": {"fc.weight": torch.zeros(3)}}, {3: torch.zeros(3)},
        {"fc.weight": torch.zeros(3, 3).to_sparse()}, {"fc.weight": torch.zeros(3, device="meta")},
    ],
)  # fmt: skip
def test_a_pickle_of_anything_else_is_refused(content, target, tmp_path, capsys):
    source = first_ones(tmp_path / "source", tiny_recurrent(target, "eagle3", layer_ids=USUAL))
    if isinstance(content, bytes):
        (source / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, source / "pytorch_model.bin")
    with pytest.raises(HeadError, match=r"pytorch_model\.bin"):
        brought_in(source, target, tmp_path / "out")
    assert capsys.readouterr().out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["..", "../model.safetensors", "", 3, None])
def test_an_index_names_files_of_the_folder_only(place, target, tmp_path):
    source = specforge(tmp_path / "source", tiny_recurrent(target, "eagle3", layer_ids=USUAL))
    (source / "model.safetensors").rename(tmp_path / "model.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": place}}))
    with pytest.raises(HeadError):
        brought_in(source, target, tmp_path / "out")


@pytest.mark.parametrize("architectures", [3, True, {"a": 1}, [None], "LlamaForCausalLMEagle3", None])
def test_names_of_any_kind_are_looked_at(architectures, target, tmp_path):
    source = specforge(tmp_path / "source", tiny_recurrent(target, "eagle3", layer_ids=USUAL), architectures=architectures)
    assert detect(source) == "eagle3"


def test_a_config_that_is_no_object_is_refused(target, tmp_path):
    source = specforge(tmp_path / "source", tiny_recurrent(target, "eagle3", layer_ids=USUAL))
    (source / "config.json").write_text("[1]")
    with pytest.raises(HeadError, match="an object was expected"):
        convert(source, "eagle3", "dspark", tmp_path / "out", target, "", lambda text: None)


def test_it_is_only_read(target, tmp_path):
    source = specforge(tmp_path / "source", tiny_recurrent(target, "eagle3", layer_ids=USUAL))
    with pytest.raises(SettingError, match="only read"):
        convert(source, "eagle3", "specforge", tmp_path / "out", target, "", lambda text: None)
    with pytest.raises(HeadError, match="in the format of EAGLE-3") as refused:
        load_head(source, target)
    assert "dspark convert" in refused.value.hint


def test_the_command_line_brings_one_in(tmp_path, capsys):
    folder = save_tiny_target(tmp_path / "target", num_hidden_layers=LAYERS)
    target = load_target(str(folder), dtype="float32")
    source = specforge(tmp_path / "source", tiny_recurrent(target, "eagle3", layer_ids=USUAL))
    code, _, errors = run(capsys, "convert", str(source), str(tmp_path / "out"))
    assert code == 2 and "--target TARGET" in errors
    code, _, errors = run(capsys, "convert", str(tmp_path / "out"), str(tmp_path / "back"), "--to", "eagle3")
    assert code == 2 and "--to is 'eagle3', a format that is only read" in errors
    for more in (["--to", "gguf"], ["--taps", "1,2,3"]):  # before a target is loaded
        code, _, errors = run(capsys, "convert", str(source), str(tmp_path / "out"), "--target", str(tmp_path / "none"), *more)
        assert code == 2 and "only read" in errors
    code, out, errors = run(capsys, "convert", str(source), str(tmp_path / "out"), "--target", str(folder), "--dtype", "float32")
    assert code == 0 and out.strip() == str(tmp_path / "out"), errors
    assert "reads the target's layers 1, 3, 4 (the usual ones: the head names none)" in errors
    assert "on the golden text\n" in errors  # the golden vectors are new: nothing to compare with
    code, _, errors = run(capsys, "inspect", str(tmp_path / "out"))
    assert code == 0
    code, out, errors = run(
        capsys, "generate", str(folder), "ab", "--head", str(tmp_path / "out"), "--raw", "--max-new-tokens", "5", "--dtype", "float32"
    )
    assert code == 0, errors
