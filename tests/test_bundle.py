"""The DSpark head in a DeepSeek-V4 checkpoint: the released formulas, the target's own text, one clear error for what is not so."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dspark
from bundles import BUNDLED, LAYERS, bundle_of, save_with_bundle
from dspark.cli.main import main
from dspark.core.sampling import GREEDY, Streams
from dspark.drafters import DSparkDrafter
from dspark.drafters.arbiter import NOMINAL
from dspark.engine.engine import Engine
from dspark.engine.load import Load
from dspark.engine.request import Request
from dspark.errors import HeadError
from dspark.generation import generate, make_law
from dspark.head import bundle
from dspark.head.bundle import as_decoder
from dspark.head.folder import find_head
from dspark.head.head import Head
from dspark.measure.lossless import round_law
from dspark.target.load import load_target
from dspark.target.target import Target
from oracle import plain_greedy
from saved import byte_tokenizer
from test_engine import mixed_requests, reference, serve

PROMPT = [3, 17, 99, 45, 8, 8, 101, 64, 3, 17, 99, 5, 70]  # longer than the window of 6
NUM_NEW = 12
ROUNDING = 1e-4
WINDOW, BLOCK = 6, BUNDLED["dspark_block_size"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_with_bundle(tmp_path_factory.mktemp("v4"))


@pytest.fixture(scope="module")
def pair(folder) -> tuple[Target, Head]:
    target = load_target(folder)
    return target, dspark.load_head(folder, target)


@pytest.fixture(scope="module")
def lucky(tmp_path_factory) -> tuple[Target, Head]:
    """A pair whose drafts are right now and then."""
    folder = save_with_bundle(tmp_path_factory.mktemp("lucky"), shards=True, prompt=PROMPT, dspark_markov_rank=128)
    target = load_target(folder)
    return target, dspark.load_head(folder, target)


@dataclass
class Formulas:
    """The released model's formulas in float64, a row, head and expert at a time, without any of the code under test. `wrong` names a
    mistake to make: each must show."""

    target: Target
    tensors: dict[str, torch.Tensor]
    wrong: str = ""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name].double()

    @property
    def config(self):
        return self.target.model.config

    def rms(self, x: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
        return x / math.sqrt(float((x * x).mean()) + self.config.rms_norm_eps) * weight

    def rotated(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """Of the last channels, by pairs of neighbours; a negative position turns back."""
        x, R = x.clone(), self.config.qk_rope_head_dim
        start = len(x) - R
        for i in range(0, R, 2):
            angle = position * 10000.0 ** (-i / R)
            a, b = float(x[start + i]), float(x[start + i + 1])
            x[start + i], x[start + i + 1] = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
        return x

    def taps(self, ids: list[int]) -> list[list[torch.Tensor]]:
        """Of each token the tapped layers' mean streams."""
        seen: dict[int, torch.Tensor] = {}

        def note(k):
            return lambda module, args, output: seen.update({k: (args[0] if self.wrong == "input of the layer" else output)[0].double()})

        hooks = [self.target.layers[k].register_forward_hook(note(k)) for k in self.config.dspark_target_layer_ids]
        with torch.inference_mode():
            self.target.model(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        taps = self.config.dspark_target_layer_ids
        return [[seen[k][t].mean(0) for k in taps] for t in range(len(ids))]

    def context(self, ids: list[int]) -> list[torch.Tensor]:
        return [self.rms(self["mtp.0.main_proj.weight"] @ torch.cat(tap), self["mtp.0.main_norm.weight"]) for tap in self.taps(ids)]

    def mixed(self, streams: torch.Tensor, where: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One input out of the streams [C, D], and what brings the output back: post [C], comb [C, C]."""
        C, eps = len(streams), self.config.hc_eps
        mixes, scale, base = self[f"{where}_fn"] @ self.rms(streams.flatten()), self[f"{where}_scale"], self[f"{where}_base"]
        pre = torch.sigmoid(mixes[:C] * scale[0] + base[:C]) + eps
        post = 2 * torch.sigmoid(mixes[C : 2 * C] * scale[1] + base[C : 2 * C])
        comb = (mixes[2 * C :] * scale[2] + base[2 * C :]).view(C, C).softmax(1) + eps
        comb = comb / (comb.sum(0, keepdim=True) + eps)
        for _ in range(self.config.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(1, keepdim=True) + eps)
            comb = comb / (comb.sum(0, keepdim=True) + eps)
        return pre @ streams, post, comb

    def back(self, streams: torch.Tensor, output: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
        comb = comb.T if self.wrong == "mixed the other way" else comb
        return torch.stack([post[k] * output + sum(comb[j, k] * streams[j] for j in range(len(streams))) for k in range(len(streams))])

    def key(self, k: int, x: torch.Tensor, position: int) -> torch.Tensor:
        return self.rotated(self.rms(self[f"mtp.{k}.attn.wkv.weight"] @ x, self[f"mtp.{k}.attn.kv_norm.weight"]), position)

    def attended(self, k: int, inputs: list[torch.Tensor], context: list[torch.Tensor]) -> list[torch.Tensor]:
        config, n = self.config, len(context)
        H, E, groups, at = config.num_attention_heads, config.head_dim, config.o_groups, f"mtp.{k}.attn."
        window = WINDOW + 1 if self.wrong == "window" else WINDOW
        seen = [self.key(k, context[t], t) for t in range(max(0, n - window), n)]
        own = [self.key(k, x, n + g) for g, x in enumerate(inputs)]
        outputs = []
        for g, x in enumerate(inputs):
            low = self.rms(self[f"{at}wq_a.weight"] @ x, self[f"{at}q_norm.weight"])
            queries, heads = (self[f"{at}wq_b.weight"] @ low).view(H, E), []
            keys = [*seen, *(own[: g + 1] if self.wrong == "causal" else own)]
            for h in range(H):
                query = queries[h] if self.wrong == "queries without a norm" else self.rms(queries[h])
                query = self.rotated(query, n + g)
                powers = [math.exp(float(query @ key) / math.sqrt(E)) for key in keys]
                total = sum(powers) + (0.0 if self.wrong == "no sink" else math.exp(float(self[f"{at}attn_sink"][h])))
                head = sum(power / total * key for power, key in zip(powers, keys, strict=True))
                heads.append(head if self.wrong == "not turned back" else self.rotated(head, -(n + g)))
            rows = self[f"{at}wo_a.weight"].view(groups, config.o_lora_rank, -1)
            grouped = [rows[i] @ torch.cat(heads[i * H // groups : (i + 1) * H // groups]) for i in range(groups)]
            outputs.append(self[f"{at}wo_b.weight"] @ torch.cat(grouped))
        return outputs

    def expert(self, where: str, x: torch.Tensor) -> torch.Tensor:
        limit = self.config.swiglu_limit
        gate, up = self[f"{where}.w1.weight"] @ x, self[f"{where}.w3.weight"] @ x
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return self[f"{where}.w2.weight"] @ (gate / (1 + (-gate).exp()) * up)

    def mixture(self, k: int, x: torch.Tensor) -> torch.Tensor:
        at = f"mtp.{k}.ffn."
        scores = torch.log1p((self[f"{at}gate.weight"] @ x).exp()).sqrt()
        biased = scores + (0.0 if self.wrong == "router without its bias" else self[f"{at}gate.bias"])
        best = sorted(range(len(scores)), key=lambda e: -float(biased[e]))[: self.config.num_experts_per_tok]
        total = sum(float(scores[e]) for e in best)
        routed = sum(float(scores[e]) / total * self.config.routed_scaling_factor * self.expert(f"{at}experts.{e}", x) for e in best)
        return routed + self.expert(f"{at}shared_experts", x)

    def hidden(self, ids: list[int]) -> torch.Tensor:
        """States [G, D] of the block after `ids`, whose last token is the anchor, before the norm."""
        context = self.context(ids)[:-1]
        embedding = self.target.model.get_input_embeddings().weight.detach().double()
        block = [ids[-1], *[BUNDLED["dspark_noise_token_id"]] * (BLOCK - 1)]
        streams = [embedding[token].expand(self.config.hc_mult, -1) for token in block]
        for k in range(LAYERS):
            for part in ("attn", "ffn"):
                mixes = [self.mixed(s, f"mtp.{k}.hc_{part}") for s in streams]
                inputs = [self.rms(x, self[f"mtp.{k}.{part}_norm.weight"]) for x, _, _ in mixes]
                outputs = self.attended(k, inputs, context) if part == "attn" else [self.mixture(k, x) for x in inputs]
                streams = [self.back(s, o, post, comb) for s, o, (_, post, comb) in zip(streams, outputs, mixes, strict=True)]
        reduced, last = [], f"mtp.{LAYERS - 1}.hc_head_"
        for s in streams:
            pre = torch.sigmoid(self[f"{last}fn"] @ self.rms(s.flatten()) * self[f"{last}scale"] + self[f"{last}base"])
            reduced.append((pre + self.config.hc_eps) @ s)
        return torch.stack(reduced)

    def draft(self, ids: list[int], tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
        """States, and along these drafted tokens logits [G, V] and confidences."""
        last, hidden = f"mtp.{LAYERS - 1}.", self.hidden(ids)
        rows, previous, confidences, logits = self.target.model.lm_head.weight.detach().double(), ids[-1], [], []
        for x, token in zip(hidden, tokens, strict=True):
            normed = self.rms(x, self[f"{last}norm.weight"])
            w = self[f"{last}markov_head.markov_w1.weight"][previous]
            logits.append(rows @ normed + self[f"{last}markov_head.markov_w2.weight"] @ w)
            read = normed if self.wrong == "confidence behind the norm" else x
            confidences.append(float(torch.sigmoid(self[f"{last}confidence_head.proj.weight"][0] @ torch.cat([read, w]))))
            previous = token
        return hidden, torch.stack(logits), confidences


def drafted(target: Target, head: Head, ids: list[int], temperature: float = 1.0, pieces: int = 4):
    """The draft after `ids`; the context comes in some pieces."""
    drafter = DSparkDrafter(head, target)
    drafter.start()
    features = target.prefill(target.start(), ids[:-1])
    for piece in features.split(pieces):
        drafter.commit(piece)
        drafter.flush()
    return drafter.draft(ids, BLOCK, make_law(temperature), torch.Generator().manual_seed(5))


def laws(draft) -> torch.Tensor:
    return torch.stack([draft.probs_KV[k] for k in range(len(draft.tokens))]).double()


@pytest.mark.parametrize("length", [1, 2, WINDOW, WINDOW + 1, WINDOW + 2, len(PROMPT)])
def test_a_draft_is_that_of_the_released_formulas(length, folder, pair):
    (target, head), ids = pair, PROMPT[:length]
    formulas = Formulas(target, load_file(folder / "model.safetensors"))
    found = drafted(target, head, ids)
    _, logits, confidences = formulas.draft(ids, found.tokens)
    assert len(found.tokens) == BLOCK and logits.std() > 1
    assert (laws(found) - logits.softmax(-1)).abs().max() < ROUNDING
    assert torch.allclose(torch.tensor(found.confidences).double(), torch.tensor(confidences).double(), atol=ROUNDING)
    assert max(confidences) - min(confidences) > 0.05


def test_context_and_states_are_those_of_the_formulas(folder, pair):
    target, head = pair
    formulas = Formulas(target, load_file(folder / "model.safetensors"))
    features = target.prefill(target.start(), PROMPT)
    context = torch.stack(formulas.context(PROMPT))
    assert (head.context(features[None])[0].double() - context).abs().max() < ROUNDING * context.abs().max()
    seen = head.config.first_seen(len(PROMPT) - 1)
    assert seen == len(PROMPT) - 1 - WINDOW
    positions = torch.arange(seen, len(PROMPT) - 1)
    anchor = target.embed(torch.tensor([[PROMPT[-1]]]))
    hidden = head.hidden(anchor, torch.tensor([[len(PROMPT) - 1]]), head.context_kv(features[None, seen:-1], positions[None]))[0, 0]
    expected = formulas.hidden(PROMPT)
    assert (hidden.double() - expected).abs().max() < ROUNDING * expected.abs().max()


@pytest.mark.parametrize(
    "wrong",
    [
        "window", "causal", "no sink", "not turned back", "queries without a norm", "mixed the other way", "router without its bias",
        "input of the layer", "confidence behind the norm",
    ],
)  # fmt: skip
def test_each_mistake_shows(wrong, folder, pair):
    target, head = pair
    found = drafted(target, head, PROMPT)
    _, logits, confidences = Formulas(target, load_file(folder / "model.safetensors"), wrong).draft(PROMPT, found.tokens)
    apart = (laws(found) - logits.softmax(-1)).abs().max()
    unsure = max(abs(a - b) for a, b in zip(found.confidences, confidences, strict=True))
    assert max(float(apart), unsure) > 20 * ROUNDING


def test_greedy_tokens_are_those_of_transformers(pair, lucky):
    for (target, head), lengths in ((pair, (1,)), (lucky, (2, len(PROMPT)))):
        for length in lengths:
            result = generate(target, head, PROMPT[:length], NUM_NEW)
            assert result.token_ids == plain_greedy(target, PROMPT[:length], NUM_NEW)
            assert sum(done.num_drafted for done in result.rounds_log) > NUM_NEW / 2
    assert result.rounds < NUM_NEW - 2  # drafts of the last pair are accepted now and then


def test_a_seed_replays_and_the_law_of_a_round_is_the_targets(lucky):
    target, head = lucky
    answers = [generate(target, head, PROMPT, 5, temperature=1.0, seed=seed).token_ids for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    check = round_law(target, head, [PROMPT], "dspark")
    assert check.passed, check.detail


def test_the_engine_gives_the_reference_loops_answers(lucky, monkeypatch):
    monkeypatch.setattr("dspark.engine.engine.measured_load", lambda *measured: Load(NOMINAL, {}))
    target, head = lucky
    engine = Engine(target, head, max_running=4, plan="fixed")
    requests = [Request(r.prompt_ids, min(r.max_new_tokens, 8), r.law, r.seed, eos_ids=r.eos_ids) for r in mixed_requests(5)]
    ears = serve(engine, requests, all_at_once=False)
    assert [ear.ids for ear in ears] == [reference(target, request) for request in requests]
    assert any("accepted" in ear.sources for ear in ears)


def test_the_context_of_a_forked_drafter_is_its_own(pair):
    target, head = pair
    drafter = DSparkDrafter(head, target)
    drafter.commit(target.prefill(target.start(), PROMPT[:8]))
    drafter.flush()
    other = drafter.fork(6)
    assert drafter.runner.token_bytes == 4 * LAYERS * head.config.head_dim  # keys alone
    continued = [*PROMPT[:6], 50, 60]
    other.commit(target.prefill(target.start(), continued)[6:])
    draft = other.draft([*continued, 7], BLOCK, make_law(1.0), torch.Generator().manual_seed(5))
    assert (laws(draft) - laws(drafted(target, head, [*continued, 7]))).abs().max() < ROUNDING


def test_bfloat16_keeps_what_the_releases_keep_in_float32(folder):
    target = load_target(folder, dtype="bfloat16")
    head = dspark.load_head(folder, target)
    kept = {name for name, parameter in head.named_parameters() if parameter.dtype == torch.float32}
    for name in (
        "markov_head.markov_w2.weight",
        "confidence_head.proj.weight",
        "layers.0.attn_hc.fn",
        "hc_head.hc_fn",
        "hidden_norm.weight",
    ):
        assert name in kept
    assert head.fc.weight.dtype == head.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert len(drafted(target, head, PROMPT, 0.0).tokens) == BLOCK


def quantized(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """As the releases hold them, experts in FP4 and projections in FP8, and the numbers that this stands for, worked out here."""
    fp4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
    random = torch.Generator().manual_seed(0)
    stored, plain = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        routed, projection = ".experts." in name, name.endswith((".wq_b.weight", ".wo_b.weight", "main_proj.weight"))
        if not (name.startswith("mtp.") and (routed or projection)):
            continue
        rows, columns = tensor.shape
        block = (1, 32) if routed else (16, 16)
        powers = torch.randint(-3, 1, (rows // block[0], columns // block[1]), generator=random)
        scale = (2.0**powers).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        if routed:
            codes = torch.randint(16, tensor.shape, generator=random)
            stored[name] = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
            plain[name] = fp4[codes] * scale
        else:
            stored[name] = tensor.to(torch.float8_e4m3fn)
            plain[name] = stored[name].float() * scale
        stored[name.removesuffix("weight") + "scale"] = (powers + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return stored, plain


def test_fp8_and_fp4_are_read_as_the_numbers_they_stand_for(folder, tmp_path):
    stored, plain = quantized(load_file(folder / "model.safetensors"))
    loaded = []
    for name, tensors in (("stored", stored), ("plain", plain)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((folder / "config.json").read_text())
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        target = load_target(folder, dtype="bfloat16")
        loaded.append(dict(dspark.load_head(tmp_path / name, target).named_parameters()))
    assert loaded[0].keys() == loaded[1].keys() and all(torch.equal(loaded[0][name], loaded[1][name]) for name in loaded[0])


def changed(folder: Path, tmp_path: Path, config: dict | None = None, **tensors: torch.Tensor | None) -> Path:
    """A copy of a checkpoint with some of its tensors or settings changed, or left out (None)."""
    held = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        held.pop(name, None)
        if tensor is not None:
            held[name] = tensor
    settings = json.loads((folder / "config.json").read_text()) | (config or {})
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


W2 = "mtp.2.markov_head.markov_w2.weight"
WRONG = {
    "missing": ({"mtp.1.ffn.experts.3.w2.weight": None}, r"missing mtp\.1\.ffn\.experts\.3\.w2\.weight"),
    "last layer missing": ({W2: None, "mtp.2.norm.weight": None}, r"missing mtp\.2\.markov_head\.markov_w2\.weight; missing mtp\.2\.norm"),
    "shape": ({W2: torch.zeros(128, 5)}, r"markov_w2\.weight has shape \(128, 5\) instead of \(128, 6\)"),
    "unexpected": ({"mtp.0.embed.weight": torch.zeros(128, 32)}, r"unexpected mtp\.0\.embed\.weight"),
    "dtype": ({W2: torch.zeros(128, 6, dtype=torch.int32)}, r"markov_w2\.weight is stored as int32"),
    "scale": ({W2: torch.zeros(128, 6, dtype=torch.int8)}, r"markov_w2\.weight is stored as int8 without a scale"),
    "weight": ({"mtp.0.attn.wq_z.scale": torch.ones(1, 1)}, r"has mtp\.0\.attn\.wq_z\.scale without mtp\.0\.attn\.wq_z\.weight"),
    "scale of plain numbers": ({"mtp.0.attn.wq_a.scale": torch.ones(1, 1)}, r"wq_a\.scale beside .*wq_a\.weight, which is stored as plain"),
    "not a number": ({W2: torch.full((128, 6), torch.nan)}, r"NaN or infinity in mtp\.2\.markov_head"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_by_name(case, folder, pair, tmp_path):
    tensors, message = WRONG[case]
    with pytest.raises(HeadError, match=message) as caught:
        dspark.load_head(changed(folder, tmp_path, **tensors), pair[0])
    assert caught.value.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_size", 65), ("block_size", "4"), ("noise_token_id", 128), ("markov_rank", None), ("target_layer_ids", [1, 4]), ("target_layer_ids", [])],
)  # fmt: skip
def test_senseless_settings_are_refused_by_name(key, value, folder, pair, tmp_path):
    with pytest.raises(HeadError, match=f"dspark_{key} is"):
        dspark.load_head(changed(folder, tmp_path, {f"dspark_{key}": value}), pair[0])


def test_other_targets_and_checkpoints_without_one_are_refused(folder, tmp_path):
    from tiny import tiny_model

    with pytest.raises(HeadError, match="is for DeepSeek-V4, and LlamaForCausalLM is llama"):
        dspark.load_head(folder, Target(tiny_model("llama")))
    names = {name: None for name in load_file(folder / "model.safetensors") if name.startswith("mtp.")}
    bare = changed(folder, tmp_path, **names)
    with pytest.raises(HeadError, match=r"says that it brings a DSpark head, and has no tensors mtp\.\*"):
        dspark.load_head(bare, load_target(bare))
    assert find_head(None, str(bare)) is None and find_head(None, str(folder)) == folder


def test_the_command_line_takes_it_by_itself_and_only_reads_it(tmp_path, capsys):
    folder = save_with_bundle(tmp_path / "target", vocab_size=259, shards=True)
    byte_tokenizer().save_pretrained(folder)
    texts = []
    for more in ([], ["--head", "none"]):
        assert main(["generate", str(folder), "hello", "--max-new-tokens", "6", "--plan", "fixed", "--json", *more]) == 0
        captured = capsys.readouterr()
        texts.append(json.loads(captured.out)["token_ids"])
        assert (f"drafting with the head in the checkpoint {folder}" in captured.err) == (not more)
    assert texts[0] == texts[1]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n')
    assert (
        main(["bench", str(folder), "--prompts", str(prompts), "--compare", "plain,dspark@fixed", "--max-new-tokens", "4", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["modes"]
    assert report["dspark@fixed"]["identical_to_plain"] == 1
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    for command in (
        ["calibrate", str(folder), "--target", str(folder)], ["inspect", str(folder)],
        ["adapt", str(folder), "--target", str(folder), "--out", str(tmp_path / "out")],
        ["train", str(folder), "--out", str(tmp_path / "out"), "--start-from", str(folder)],
    ):  # fmt: skip
        assert main(command) == 2
        assert "the DSpark head that it brings is only read" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_tensor_that_transformers_renames_in_another_way_is_not_lost(folder, pair, monkeypatch):
    monkeypatch.setattr(bundle, "as_decoder", lambda name, num: as_decoder(name, num).replace("main_norm", "main_standard"))
    with pytest.raises(HeadError, match=r"does not take in the head in .*: main_norm\.weight"):
        dspark.load_head(folder, pair[0])


def test_it_is_not_saved(pair, tmp_path):
    from dspark.head.folder import save_head

    with pytest.raises(HeadError, match="only read"):
        save_head(pair[1], pair[0], tmp_path / "out", PROMPT, {}, "")
    assert not (tmp_path / "out").exists()


def test_nothing_is_drafted_where_none_is_asked(pair):
    target, head = pair
    assert DSparkDrafter(head, target).draft(PROMPT, 0, GREEDY, Streams(0).draft).tokens == []
    assert bundle_of(target.model.config, 0).keys() == {
        n for n in load_file(Path(target.name) / "model.safetensors") if n.startswith("mtp.")
    }
