"""Options that several verbs share, and how they become target, head and prompts."""

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dspark import collector_waits
from dspark.config import RECURRENT_KINDS
from dspark.errors import PromptError, SettingError
from dspark.limits import check_law, check_names, check_settings
from dspark.prompts import Prompt, read_prompts

NEED_NO_HEAD = ("mtp",)  # drafters: this one's weights are the target's own, unless a head of its kind is given


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """What is imported and loaded here stays until the end: the garbage collector never looks at it."""
    with collector_waits():
        yield
        gc.freeze()


def add_drafter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--drafter",
        default=None,
        metavar="NAME",
        help="auto, dspark, dflash, mtp (a head of this kind, or the target's own multi-token-prediction modules), eagle3, mtp+dspark (the modules' "
        "first token, and the head from there on), lookup or none (default auto: by round the head, those modules or lookup)",
    )


def add_modules(parser: Any) -> None:
    parser.add_argument(
        "--mtp",
        default=None,
        metavar="HEAD",
        help="a trained head of the kind mtp or eagle3 in the place of the target's own multi-token-prediction modules",
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def add_target(parser: argparse.ArgumentParser, dtype: str = "auto", name: str = "target", default: str | None = None) -> None:
    needed: dict[str, Any] = {"required": True} if name.startswith("-") else {"nargs": "?", "default": default} if default else {}
    known = f" (default {default})" if default else ""
    parser.add_argument(name, metavar="TARGET", help=f"folder, hub id, or smollm2-135m (the demo target){known}", **needed)
    parser.add_argument(
        "--dtype",
        default=dtype,
        help=f"precision of the target: auto (the checkpoint's own), float32, bfloat16 or int8 weights (default {dtype})",
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="where the target runs (default cpu)")
    parser.add_argument(
        "--runtime",
        default="auto",
        help="auto, native, eager, or graph: CUDA graphs, on a GPU (default auto: native where it runs the model)",
    )
    parser.add_argument(
        "--rollback", default="auto", metavar="WAY", help="auto, or snapshot: try a model whose caches no test covers (default auto)"
    )
    parser.add_argument("--threads", type=int, default=None, metavar="N", help=threads_help())


def add_head(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--head",
        default=None,
        metavar="HEAD",
        help="folder or hub id; `none` decodes plainly (default: the shipped head, or one in the target's own checkpoint)",
    )


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plan",
        default=None,
        metavar="PLAN",
        help="how much to speculate: auto, online (auto, and confidences are corrected on the way), fixed, length:N, threshold:P, early-stop "
        "or lagged (default auto: what gains most time here)",
    )


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int = 256) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=f"exact limit (default {max_new_tokens})")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K best tokens (0: all)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the best tokens up to this mass (1: all)")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="drop tokens below this share of the best one (0: none)")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="as in transformers (1: none)")
    group.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed replays the same tokens with the same head and plan (default 0)"
    )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the text before TEXT; may be given again")


def sampling_options(options: argparse.Namespace) -> dict:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {name: getattr(options, name) for name in names} | {"stop": tuple(options.stop)}


def check_sampling(options: argparse.Namespace) -> None:
    """Raises `SettingError` for sampling settings without meaning, and for drafters and plans that are none, before torch is imported."""
    check_names(options.drafter, options.plan)
    check_settings(options.max_new_tokens, options.seed, options.stop, flag)
    check_law(options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty, flag)


def flag(name: str) -> str:
    """The option that sets what Python calls so."""
    return f"--{name.replace('_', '-')}"


def threads_help() -> str:
    return f"CPU threads; {cores()} CPUs can be used here (default: all cores)"


def cores() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(options: argparse.Namespace) -> None:
    import torch

    if options.threads is not None:
        if not 1 <= options.threads <= 4 * cores():
            raise SettingError(
                f"--threads is {options.threads}", f"use 1 to {cores()}: {cores()} CPUs can be used here, more threads only slow down"
            )
        torch.set_num_threads(options.threads)


def check_heads(options: argparse.Namespace) -> None:
    """Whether the folders given for heads hold some, and of a kind that can be what it is asked to be: their files tell, before the target is
    loaded. Raises `HeadError`, and `SettingError` where one leaves the other nothing to do."""
    from dspark.head.folder import kind_in, named_head
    from dspark.head.mtp import cannot_stand

    head, mtp = (getattr(options, name, None) for name in ("head", "mtp"))
    if mtp is not None and (kind := kind_in(named_head(mtp))) not in RECURRENT_KINDS:
        raise cannot_stand(kind)
    if head not in (None, "none") and (kind := kind_in(named_head(head))) in RECURRENT_KINDS and mtp is not None:
        raise SettingError(f"--head is of the kind {kind}, and --mtp stands for the same", "leave one of them out")


@starting()
def open_target(options: argparse.Namespace):
    """The target asked for, with what stands for its modules. What can be said of the options before it is loaded is said before."""
    set_threads(options)
    drafter = getattr(options, "drafter", None)
    if getattr(options, "mtp", None) is not None and drafter not in (None, "auto", "mtp", "mtp+dspark"):
        raise SettingError(f"--mtp cannot take effect with --drafter {drafter}", "leave one of them out")
    check_heads(options)
    from dspark.target.load import load_target

    target = load_target(options.target, dtype=options.dtype, device=options.device, runtime=options.runtime, rollback=options.rollback)
    options.dtype = target.precision  # what auto came to
    if getattr(options, "mtp", None) is not None:
        from dspark.head.folder import load_head, named_head
        from dspark.head.mtp import stand_for_modules

        say_unfinished(named_head(options.mtp))
        stand_for_modules(target, load_head(named_head(options.mtp), target))
    return target


@starting()
def open_head(options: argparse.Namespace, target, otherwise: str = "decoding plainly"):
    """The head asked for, or the shipped one; None without, with a word of what is done `otherwise` when none is known."""
    from dspark.head.folder import find_head, load_head
    from dspark.head.head import Head

    if options.head == "none" or (options.head is None and getattr(options, "drafter", None) in NEED_NO_HEAD):
        return None
    folder = find_head(options.head, target.name)
    if folder is None and getattr(options, "mtp", None) is None:
        say(f"no head is known for {target.name}: {otherwise} (train one: `dspark train {target.name} --out DIR`)")
    if folder is None:
        return None
    say_unfinished(folder)
    head = load_head(folder, target)
    if isinstance(head, Head) and head.bundled:
        say(f"drafting with the head in the checkpoint {folder}")
    return head


def say_unfinished(folder: Path) -> None:
    """A word where the run that makes the head in this folder was stopped before its end."""
    from dspark.head.folder import way_on

    if on := way_on(folder):
        say(f"warning: the run that makes {folder} was stopped before it measured and calibrated this head; go on with `{on}`")


def say_calibration(head, temperature: float) -> None:
    """A word when the confidences of a calibrated head were fitted under no law of this temperature."""
    fitted = [f"{fit.temperature:g}" for fit in head.calibration.fits] if head is not None and head.calibration is not None else []
    if fitted and f"{temperature:g}" not in fitted:
        nearest = head.calibration.nearest(temperature).temperature
        say(f"calibrated for {' and '.join(f'T={T}' for T in fitted)}; T={temperature:g} uses the fit for T={nearest:g}")


def check_text(what: str, text: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):  # Python's stand-ins for bytes that are no text
        raise PromptError(f"{what} {text!a} is not text in this terminal's encoding", "write it in UTF-8")


def open_prompts(texts: list[str], file: str | None) -> list[Prompt]:
    for text in texts:
        check_text("the prompt", text)
    prompts = [Prompt(text) for text in texts] + (read_prompts(file) if file else [])
    if not prompts:
        raise PromptError("no prompt given", "pass a PROMPT, or --prompts FILE.jsonl")
    for index, prompt in enumerate(prompts):
        if not prompt.content:
            raise PromptError(f"prompt {index} is empty", "give it some text")
    return prompts


def check_file(name: str, file: str | Path) -> None:
    """That an option's file can be written is seen before what takes long. Nothing is left, and a file that is there stays as it is."""
    path = Path(file)
    try:
        if path.is_dir():
            raise SettingError(f"{name} is {file}, a folder", "name a file")
        if path.exists() and not path.is_file():  # a pipe or a device: opening it would be seen
            return
        real = path.resolve()  # a link may point to where nothing is yet
        there = real.exists()
        real.open("ab").close()
        if not there:
            real.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise SettingError(
            f"{name} is {file}, which cannot be written: {getattr(error, 'strerror', None) or error}",
            "name a file in a folder that exists and is yours",
        ) from error


def check_folder(name: str, folder: str | Path, files: Sequence[str]) -> None:
    """The same of files in a folder that may be still to be made."""
    path = Path(folder).absolute()
    try:
        made = [each for each in (path, *path.parents) if not os.path.exists(each)]
        try:
            path.mkdir(parents=True, exist_ok=True)
            for file in files:
                if (path / file).is_dir():
                    raise SettingError(f"{name} is {folder}, in which {file} is a folder", "move it away, or name another folder")
                check_file(name, path / file)
        finally:
            for each in made:
                if os.path.exists(each):
                    each.rmdir()
    except OSError as error:
        raise SettingError(f"{name} is {folder}, which cannot be made: {error.strerror}", "name another folder") from error
