"""Training on a GPU. What a GPU does differently is compared with what a CPU does: on the CPU for all that can run there, on a
GPU where there is one (the tests marked `on_gpu`; CI has none)."""

import json
from dataclasses import fields, replace

import pytest
import torch

from dspark.config import TrainConfig
from dspark.generation import generate
from dspark.head.folder import load_head
from dspark.measure.lossless import verify_pair
from dspark.profiling import profile
from dspark.target.load import load_target
from dspark.target.target import Target
from dspark.train import sample as sampling
from dspark.train import trainer
from dspark.train.batch import draw_batch, make_batch
from dspark.train.features import FeatureStore
from dspark.train.loss import log_softmax_at
from dspark.train.run import train
from dspark.train.sample import sample_batch
from saved import save_tiny_target
from tiny import tiny_head, tiny_model, tiny_recurrent

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]
CONFIG = TrainConfig(
    steps=6, sequences_per_step=2, anchors_per_sequence=5, held_out=4, num_prompts=8, max_answer_tokens=12, teacher_tokens=8, learning_rate=1e-2
)  # fmt: skip
SHAPE = {"num_hidden_layers": 1, "block_size": 3, "markov_rank": 4, "draft_vocab_size": 260}


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """The compiler takes a minute for what these tests do in a second; `test_a_compiled_step_is_the_eager_one` has it."""
    monkeypatch.setattr(trainer, "COMPILE", False)


def records(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    make = lambda n: torch.randint(128, (n,), generator=generator).tolist()  # noqa: E731
    return [{"prompt_ids": make(1 + i % 4), "answer_ids": make(9 + i % 3), "temperature": float(i % 2), "kind": "x"} for i in range(count)]


def tiny_target(device: str) -> Target:
    target = Target(tiny_model("llama").to(device), name="tiny")
    target.tap((0, 3))
    return target


@pytest.fixture(params=DEVICES)
def resident(request, tmp_path, monkeypatch) -> FeatureStore:
    """A store as on a GPU, on each device there is."""
    monkeypatch.setattr("dspark.train.features.fits_gpu", lambda device, num_bytes: True)
    return FeatureStore(tiny_target(request.param), records(9), tmp_path / "unused", 8, 1.0)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.cpu().float(), expected.cpu().float(), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("pass_tokens", [1, 30, 10_000])
def test_samples_of_large_passes_are_those_of_single_ones(resident, tmp_path, monkeypatch, pass_tokens):
    monkeypatch.setattr("dspark.train.features.PASS_TOKENS", pass_tokens)
    monkeypatch.setattr("dspark.train.features.TEACHER_ROWS", 7)
    single = cpu_store(tmp_path)
    resident.fill([4, 4, 7])
    assert resident.filled.tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 0]
    resident.fill(range(9))
    for i in range(9):
        found, expected = resident[i], single[i]
        assert found.start == expected.start and torch.equal(found.ids_S.cpu(), expected.ids_S)
        same(found.features_SMD, expected.features_SMD)
        same(found.teacher_probs_nP, expected.teacher_probs_nP)
        assert torch.equal(found.teacher_ids_nP[:, 0].cpu(), expected.teacher_ids_nP[:, 0])


def cpu_store(directory) -> FeatureStore:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark.train.features.fits_gpu", lambda device, num_bytes: False)
        return FeatureStore(tiny_target("cpu"), records(9), directory / "cache", 8, 1.0)


@pytest.mark.parametrize("num_anchors", [3, 40])
def test_a_gathered_batch_is_the_packed_one(resident, num_anchors):
    chosen, G = [6, 2, 5], 4
    found = draw_batch(resident, chosen, num_anchors, G, torch.Generator().manual_seed(1))
    expected = make_batch([resident[i] for i in chosen], num_anchors, G, torch.Generator().manual_seed(1))
    width = expected.features_NSMD.shape[1]
    for field in fields(found):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if field.name in ("features_NSMD", "following_NS"):
            seen = expected.visible_NAS.any(1)  # what lies past an answer's end is padding, and differs
            a, b = a[:, :width][seen], b[seen]
        elif field.name == "visible_NAS":
            assert not bool((a[..., width:] & (found.anchors_NA[..., None] < width)).any())
            a = a[..., :width]
        elif field.name.startswith("teacher"):
            a, b = a[found.valid_NAG], b[expected.valid_NAG]
        assert a.dtype == b.dtype and torch.equal(a, b), field.name


def test_a_step_on_a_gathered_batch_is_the_step_on_the_packed_one(resident):
    """Same seed, same anchors: the two stores train the same head, but for rounding."""
    packed = FeatureStore.__new__(FeatureStore)
    packed.__dict__ = resident.__dict__ | {"resident": False}
    resident.fill(range(9))
    heads = []
    for store in (resident, packed):
        head = head_of("dspark", store).requires_grad_(True)
        heads.append(trainer.train_steps(head, store.target, store, CONFIG).state_dict())
    for name in heads[0]:
        same(heads[0][name], heads[1][name])


def on_gpus(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1, dtype=torch.float32).gather(-1, index)


def head_of(kind: str, resident: FeatureStore):
    """A head of this kind on the store's device; a recurrent one reads the layers that the store has."""
    if kind in ("dspark", "dflash"):
        return tiny_head(tiny_target("cpu"), rank=4 if kind == "dspark" else 0, block_size=3).to(resident.target.device)
    head = tiny_recurrent(tiny_target("cpu"), kind, 3, trained_steps=3, layer_ids=resident.target.layer_ids)
    return head.to(resident.target.device)


def step_of(head, resident: FeatureStore, config: TrainConfig, loss) -> tuple[float, dict[str, torch.Tensor]]:
    head.zero_grad()
    batch = trainer.told(head, trainer.step_batch(resident, config, 0, trainer.trained_steps(head)))
    result = loss(head, trainer.known_states(head, resident.target, batch), batch, trainer.draft_index(head), config)
    result.total.backward()
    return result.total.item(), {name: parameter.grad.clone() for name, parameter in head.named_parameters()}


@pytest.mark.parametrize("kind", ["mtp", "eagle3"])
def test_gradients_of_a_chain_on_a_gathered_batch_are_those_on_the_packed_one(resident, kind):
    packed = FeatureStore.__new__(FeatureStore)
    packed.__dict__ = resident.__dict__ | {"resident": False}
    resident.fill(range(9))
    head = head_of(kind, resident).requires_grad_(True)
    (found, gradients), (expected, others) = (step_of(head, store, CONFIG, trainer.loss_after) for store in (resident, packed))
    assert found == pytest.approx(expected, rel=1e-3)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=0.1, atol=0.05 * gradient.abs().max().item() + 1e-6)


@pytest.mark.parametrize("kind", ["dspark", "dflash", "mtp", "eagle3"])
def test_a_compiled_step_is_the_eager_one(resident, monkeypatch, kind):
    """On the CPU the tracing half of the compiler alone, which fails on what it cannot take into one graph."""
    monkeypatch.setattr("dspark.train.loss.log_softmax_at", on_gpus)
    device = resident.target.device
    head = head_of(kind, resident).requires_grad_(True)
    head.rotary.move(device)
    monkeypatch.setattr(trainer, "COMPILE", True)
    traced = torch.compile(trainer.loss_after, backend="aot_eager", fullgraph=True)
    loss = trainer.loss_function(device) if device.type == "cuda" else traced
    config = replace(CONFIG, teacher_ce=True)
    (expected, gradients), (found, compiled) = step_of(head, resident, config, trainer.loss_after), step_of(head, resident, config, loss)
    assert found == pytest.approx(expected, rel=1e-2)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(compiled[name], gradient, rtol=0.1, atol=0.05 * scale + 1e-6)


def test_without_a_working_compiler_training_goes_on_eagerly(resident, monkeypatch):
    def compile_none(function):
        def broken(*args):
            raise RuntimeError("no C compiler\nand more")

        return broken

    monkeypatch.setattr(trainer, "COMPILE", True)
    monkeypatch.setattr(torch, "compile", compile_none)
    head = tiny_head(tiny_target("cpu"), rank=4, block_size=3).to(resident.target.device).requires_grad_(True)
    loss = trainer.loss_function(torch.device("cuda"))
    with pytest.warns(UserWarning, match="without torch.compile: no C compiler$"):
        found = step_of(head, resident, CONFIG, loss)[0]
    assert found == pytest.approx(step_of(head, resident, CONFIG, loss)[0]) == step_of(head, resident, CONFIG, trainer.loss_after)[0]


@pytest.mark.parametrize("device", DEVICES)
def test_sampling_in_parts_and_with_rare_looks_is_greedy_decoding(device, monkeypatch):
    """Prompts in several passes, answers that end at different steps, rows that are dropped: at T = 0 nothing may change."""
    target = tiny_target(device)
    prompts = [[1, 2, 3], [9, 8, 7, 6, 5, 4, 3, 2], [40], [11, 12], [90, 3, 5]]
    alone = [generate(target, None, p, 20).token_ids for p in prompts]
    stops = frozenset({alone[0][3], alone[3][9]})
    cut = [answer[: next((i + 1 for i, t in enumerate(answer) if t in stops), 20)] for answer in alone]
    assert len({len(answer) for answer in cut}) > 1
    every, part = 3, 2
    monkeypatch.setattr(sampling, "pace", lambda *_: (every, part))
    assert sample_batch(target, prompts, [0.0] * 5, 20, 0, stops) == cut


def test_log_softmax_at_has_one_form_a_device():
    logits, index = torch.randn(3, 4, 50).bfloat16(), torch.randint(50, (3, 4, 6))
    torch.testing.assert_close(log_softmax_at(logits, index), on_gpus(logits, index))


@on_gpu
def test_log_softmax_at_on_a_gpu_has_the_gradient_of_the_cpu():
    logits, index = torch.randn(300, 50).bfloat16(), torch.randint(50, (300, 6))
    gradients = []
    for device in ("cpu", "cuda"):
        x = logits.to(device).requires_grad_(True)
        (gradient,) = torch.autograd.grad(log_softmax_at(x, index.to(device)).sum(), x)
        gradients.append(gradient.cpu().float())
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_run_from_nothing_resumes_and_serves(tmp_path, device, dtype):
    """Everything `dspark train` does, on the device: prompts, answers, features, steps, rounds, the saved head."""
    folder = save_tiny_target(tmp_path / "target")
    target = load_target(folder, dtype=dtype, device=device)
    report = train(target, tmp_path / "head", CONFIG, SHAPE)
    assert report["device"] and set(report["held_out_teacher_forced"]) & {"tau_t0", "tau_t1"}
    before = (tmp_path / "head" / "model.safetensors").read_bytes()
    (tmp_path / "head" / "provenance.json").unlink()
    train(target, tmp_path / "head", CONFIG, SHAPE, resume=True)  # from the last checkpoint
    assert (tmp_path / "head" / "model.safetensors").read_bytes() == before
    head = load_head(tmp_path / "head", target)
    assert {tensor.device for tensor in (*head.parameters(), *head.buffers())} == {target.device}
    plain = generate(target, None, [1, 2, 3], 30).token_ids
    for drafter in ("dspark", "lookup", "auto"):
        drafted = generate(target, head, [1, 2, 3], 30, drafter=drafter, plan="fixed").token_ids
        assert drafted == plain or dtype == "bfloat16"  # where one row and several may round apart
    more = replace(CONFIG, steps=2)
    answers = [tmp_path / "head" / "progress" / "answers.jsonl"]
    train(target, tmp_path / "wider", more, {"markov_rank": 6}, answers=answers, start_from=tmp_path / "head")
    assert json.loads((tmp_path / "wider" / "config.json").read_text())["markov_rank"] == 6


@on_gpu
def test_a_store_too_large_for_the_gpu_stays_in_files(tmp_path, monkeypatch):
    monkeypatch.setattr("dspark.train.features.GPU_SHARE", 0.0)
    target = tiny_target("cuda")
    store = FeatureStore(target, records(9), tmp_path / "cache", 8, 1.0)
    assert not store.resident and store[3].features_SMD.device.type == "cpu"
    head = tiny_head(tiny_target("cpu"), rank=4, block_size=3).to("cuda").requires_grad_(True)
    trainer.train_steps(head, target, store, CONFIG, tmp_path / "checkpoint.pt")
    assert trainer.measure(head, target, store, CONFIG, 4)
    none_kept = FeatureStore(target, records(9), tmp_path / "none", 8, 0.0)
    assert none_kept[3].features_SMD.device.type == "cpu"


@on_gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_serving_on_a_gpu_keeps_the_text(temperature):
    target = tiny_target("cuda")
    head = tiny_head(tiny_target("cpu"), rank=4, block_size=3).to("cuda")
    for drafter in ("dspark", "lookup", "auto"):
        result = generate(target, head, [1, 2, 3, 1, 2, 3], 40, temperature=temperature, drafter=drafter, seed=5, repetition_penalty=1.1)
        again = generate(target, head, [1, 2, 3, 1, 2, 3], 40, temperature=temperature, drafter=drafter, seed=5, repetition_penalty=1.1)
        assert result.token_ids == again.token_ids and result.num_tokens == 40
    prompts = [[1, 2, 3, 1, 2, 3], [5, 6, 7, 8, 5, 6]]
    assert all(check.passed is not False for check in verify_pair(target, head, prompts, 30))


@on_gpu
def test_a_profile_measures_the_gpu():
    target = tiny_target("cuda")
    head = tiny_head(tiny_target("cpu"), rank=4, block_size=3).to("cuda")
    found = profile(target, head, context=20, rows=(1, 2, 4), repeats=3)
    assert found.draft and found.bandwidth > 2e11 and found.break_even
