"""Names of targets: what cannot be found is said at once, with the names that are near."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dspark
from dspark.errors import TargetError
from dspark.generation import generate
from dspark.target import hub
from dspark.target.load import load_target
from tiny import NATIVE_SHAPE, tiny_model


@pytest.fixture
def unreachable(monkeypatch):
    """No network; the list counts the tries."""
    tries = []

    class Session:
        def head(self, url, timeout):
            tries.append(timeout)
            raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    hub.answers.cache_clear()
    yield tries
    hub.answers.cache_clear()


@pytest.mark.parametrize(
    ("name", "near"),
    [("smollm2-135", "smollm2-135m"), ("my-modl", "my-model"), ("./my-modl", "my-model"), ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M-Instruct")],
)  # fmt: skip
def test_a_mistyped_name_is_said_once_with_the_near_ones(name, near, unreachable, tmp_path, monkeypatch, capfd):
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TargetError) as raised:
        load_target(name)
    assert f"{near}? else" in str(raised.value.hint) and "did you mean" in str(raised.value.hint)
    assert unreachable in ([], [hub.SECONDS]) and capfd.readouterr().err == ""


def test_a_name_like_no_other_gets_no_guess(unreachable):
    with pytest.raises(TargetError, match="the hub cannot be reached") as raised:
        load_target("zzz")
    assert "did you mean" not in str(raised.value.hint)


def test_a_model_that_no_test_covers_is_taken_when_asked_for_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    tiny_model("qwen3_5").save_pretrained(tmp_path)
    assert load_target(tmp_path, runtime="eager").forgets.trusted
    assert "snapshot" not in capsys.readouterr().err
    monkeypatch.setattr("dspark.target.rollback.GATED_DELTA", set())
    with pytest.raises(TargetError, match="no test covers: LinearAttentionLayer of qwen3_5_text") as raised:
        load_target(tmp_path)
    assert "--rollback snapshot" in raised.value.hint
    assert load_target(tmp_path, runtime="eager", rollback="snapshot").forgets.replays
    assert "no test of dspark covers this model" in capsys.readouterr().err


def test_a_family_without_a_class_for_text_alone_is_loaded(tmp_path):
    tiny_model("step3p7").save_pretrained(tmp_path)
    target = load_target(tmp_path, runtime="eager")
    assert type(target.model).__name__ == "Step3p7ForConditionalGeneration"
    assert generate(target, None, [3, 4, 5], 4).num_tokens == 4


@pytest.mark.parametrize(("stored", "precision"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")])
def test_auto_is_the_precision_of_the_checkpoint(stored, precision, tmp_path, capfd):
    tiny_model("llama").to(getattr(torch, stored)).save_pretrained(tmp_path)
    target = load_target(tmp_path, dtype="auto")
    assert target.precision == precision and {p.dtype for p in target.model.parameters()} == {getattr(torch, precision)}
    assert ("stored in float16" in capfd.readouterr().err) == (stored == "float16")


LOADS = """
import gc
import sys
from dspark.target.load import load_target
from dspark.target.quantize import num_bytes

def megabytes(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what)) * 1024 / 1e6

small, large = sys.argv[1:]
for dtype in ("int8", "bfloat16", "float32"):
    load_target(small, dtype=dtype)  # what is imported then
    gc.collect()
    before = megabytes("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM begins anew
    target = load_target(large, dtype=dtype)
    print(sum(map(num_bytes, target.model.parameters())) / 1e6, megabytes("VmHWM") - before, flush=True)
    del target
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not count peaks anew")
def test_a_load_takes_little_more_memory_than_the_weights_at_every_precision(tmp_path):
    tiny_model("llama", **NATIVE_SHAPE).save_pretrained(tmp_path / "small")
    shape = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    tiny_model("llama", **(NATIVE_SHAPE | shape)).save_pretrained(tmp_path / "large")  # 55 MB in float32
    environment = os.environ | {"PYTHONPATH": str(Path(dspark.__file__).parents[1])}
    folders = [str(tmp_path / name) for name in ("small", "large")]
    done = subprocess.run([sys.executable, "-c", LOADS, *folders], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loads = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert [round(weights) for weights, _ in loads] == [16, 27, 55]
    assert all(peak < weights + 20 for weights, peak in loads), loads
