"""From a name to a loaded target: a folder, a hub id, or the demo target's short name."""

import difflib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dspark.errors import RuntimeUnavailable, SettingError, TargetError, UserError
from dspark.target import demo, hub
from dspark.target.graphs import Graphs
from dspark.target.native.pages import gather_weights
from dspark.target.native.runtime import ARCHITECTURES, NativeRuntime
from dspark.target.quantize import quantize_int8, torchao_quantization
from dspark.target.rollback import check_wish
from dspark.target.target import Target

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "int8": torch.bfloat16,  # linear layers become 8-bit after loading; what remains is bfloat16
    "auto": "auto",  # the checkpoint's own
}  # fmt: skip

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "*.tiktoken")
ONLY_HEADS_HAVE = ("dspark", "speculators_model_type", "dflash_config", "target_layer_ids", "draft_vocab_size")  # in config.json
RUNTIMES = ("auto", "native", "eager", "graph")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def load_target(name: str | Path, dtype: str = "float32", device: str = "cpu", runtime: str = "auto", rollback: str = "auto") -> Target:
    """Load a Hugging Face causal LM. `dtype` auto takes the checkpoint's own precision, float32 for one that is not supported.

    `runtime` is `eager` (transformers' modules), `native` or `graph` (docs/runtime.md), or `auto`: native where it runs. `rollback` is `auto`, or
    `snapshot`: take a model whose caches no test covers, if it rolls back exactly here.
    Raises `TargetError` for an unknown name or a model that cannot be rolled back, `SettingError` for an
    unknown precision, runtime or rollback, or 8 bits without torchao, `RuntimeUnavailable` where `native` or `graph` was asked for and cannot run."""
    if dtype not in DTYPES:
        raise SettingError(f"unknown dtype {dtype!r}", f"choose one of {', '.join(DTYPES)}")
    check_runtime(runtime)
    check_wish(rollback)
    if str(device).startswith("meta"):
        raise SettingError(f"--device is {device}", "its tensors hold no numbers: use cpu, or a GPU like cuda")
    if dtype == "int8":
        torchao_quantization()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    where = demo.ensure_demo_target(say) if str(name) == demo.NAME else Path(name).expanduser()
    if str(name).startswith((".", "/", "~")) and not where.is_dir():
        raise TargetError(f"no folder {name}", f"{like(name)}give a folder written by `save_pretrained`, a hub id, or {demo.NAME}")
    source, cached_only = (where, False) if where.is_dir() else (str(name), not hub.answers())
    try:
        from transformers import AutoConfig, PreTrainedConfig

        refuse_head(name, PreTrainedConfig.get_config_dict(source, local_files_only=cached_only)[0])
        config = AutoConfig.from_pretrained(source, local_files_only=cached_only)
        # Weights that are to be gathered (pages.py) stay in the file until then, and are rounded or quantised on their way.
        runs = (config.architectures or [""])[0] in ARCHITECTURES and getattr(config, "quantization_config", None) is None
        gathers = runs and runtime in ("auto", "native") and str(device) == "cpu"
        loaded: Any = model_class(config).from_pretrained(
            source, dtype="auto" if gathers else DTYPES[dtype], output_loading_info=True, local_files_only=cached_only
        )
        model, loading = loaded
        wanted: Any = model.dtype if dtype == "auto" else DTYPES[dtype]
        if wanted not in (torch.float32, torch.bfloat16):
            say(
                f"{name} is stored in {str(wanted).removeprefix('torch.')}, which is taken up in float32; --dtype bfloat16 takes half the memory"
            )
            wanted = torch.float32
        with ThreadPoolExecutor(1) as beside:  # copying leaves the interpreter free
            gathered = beside.submit(gather_weights, model, wanted, dtype == "int8") if gathers else None
            tokenizer = load_tokenizer(source, cached_only)
            if gathered is not None:
                gathered.result()
                model.config.dtype = wanted
        if not gathers:
            if model.dtype not in (torch.float32, torch.bfloat16):
                model.float()
            move(model, device)
            if dtype == "int8":
                quantize_int8(model)
    except UserError:
        raise
    except Exception as error:  # a dozen kinds for what is one thing to the user: these files do not make a model here
        reason = (
            "there is no such folder, and the hub cannot be reached" if cached_only and isinstance(error, OSError) else first_line(error)
        )
        other = f"{like(name)}give a folder written by `save_pretrained`, a hub id of a causal language model, or {demo.NAME}"
        raise TargetError(
            f"cannot load target {str(name)!r} on {device}: {reason}",
            f"if its files are damaged, delete {where}: it is fetched anew" if str(name) == demo.NAME else other,
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise TargetError(
            f"{name} lacks {len(missing)} of the model's tensors, {missing[0]} among them", "restore the folder; it is not a whole model"
        )
    target = Target(model, tokenizer, name=str(name), rollback_by=rollback)
    say_rollback(target, say)
    use_runtime(target, runtime, gather=not gathers)
    return target


def refuse_head(name: str | Path, raw: dict[str, Any]) -> None:
    """Raise `TargetError` where config.json is of a draft head, dspark's or another project's."""
    if not any(key in raw for key in ONLY_HEADS_HAVE):
        return
    own, verifier = raw.get("dspark"), raw.get("speculators_config")
    verifier = verifier.get("verifier") if isinstance(verifier, dict) else None
    target = own.get("target") if isinstance(own, dict) else verifier.get("name_or_path") if isinstance(verifier, dict) else None
    raise TargetError(
        f"{name} is a draft head, not a target", f"give its target, {target or 'TARGET'}, and this as the head: `--head {name}`"
    )


def model_class(config: Any) -> Any:
    """AutoModelForCausalLM, or what reads images too for a family that has no class for text alone (Step-3.7)."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    wrapped = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if wrapped else AutoModelForCausalLM


def say_rollback(target: Target, say: Callable[[str], None]) -> None:
    """A word where rejected tokens are forgotten in a way that is slow, or that only a check at load vouches for."""
    if target.forgets.trusted and not target.forgets.replays:
        return
    checked = "" if target.forgets.trusted else "; no test of dspark covers this model, a check of its next logits did just now"
    say(f"roll-back by snapshot: each rejection costs one more pass over the accepted tokens{checked}")


def move(model: Any, device: str) -> None:
    """Raises `SettingError` for a device that this machine, or this build of torch, does not have."""
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's kinds for a device it does not know, lacks, or cannot fill
        gpu = "a GPU like cuda" if torch.cuda.is_available() else "install a build of torch that finds your GPU"
        raise SettingError(f"cannot put the target on {device}: {first_line(error)}", f"use --device cpu, or {gpu}") from error


def like(name: str | Path) -> str:
    """The names of the demo target and of folders beside it that `name` may be a slip for, as the start of a hint."""
    parent = Path(name).expanduser().parent
    folders = [str(Path(name).parent / f.name) for f in parent.iterdir() if f.is_dir()] if parent.is_dir() else []
    close = difflib.get_close_matches(str(name), [demo.NAME, demo.HUB_ID, *folders], n=2, cutoff=0.75)
    close = [other for other in close if other != str(name)]
    return f"did you mean {' or '.join(close)}? else " if close else ""


def load_tokenizer(where: str | Path, cached_only: bool = False) -> Any:
    """The tokenizer, or None where there is none: token ids still work, and asking for text says so.

    Raises `TargetError` for tokenizer files that cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where, local_files_only=cached_only)
    except Exception as error:  # as above; it raises the same kinds for a damaged tokenizer and for none
        files = [f.name for pattern in TOKENIZER_FILES for f in Path(where).glob(pattern)] if isinstance(where, Path) else []
        if not files and isinstance(error, (OSError, ValueError, KeyError)):
            return None
        raise TargetError(
            f"cannot read the tokenizer of {where} ({', '.join(files)}): {first_line(error)}",
            "restore these files, or remove them to work with token ids alone",
        ) from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_runtime(name: str) -> None:
    if name not in RUNTIMES:
        raise SettingError(f"unknown runtime {name!r}", f"choose one of {', '.join(RUNTIMES)}")


def use_runtime(target: Target, name: str, gather: bool = False) -> None:
    """Give the target the runtime of this name; `gather` lets it move the weights to where it reads them fastest.

    Raises `SettingError`, or `RuntimeUnavailable` where `native` or `graph` cannot run."""
    check_runtime(name)
    if name == "eager":
        return
    try:
        if name == "graph":
            target.graphs = Graphs(target.model)
        else:
            target.runtime = NativeRuntime(target.model, say, gather)
    except RuntimeUnavailable as error:
        if name != "auto":
            raise
        say(f"decoding eagerly: {error.message}")
