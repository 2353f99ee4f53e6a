"""calibration.json in a head's folder: read strictly, written whole."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from dspark.core.calibration import Calibration, Fit
from dspark.errors import HeadError
from dspark.head.head import Head
from dspark.prompts import read_json
from dspark.target.target import Target

NAME = "calibration.json"
FORMAT = 2
WAY_OUT = "delete it, or calibrate again: `dspark calibrate HEAD --target TARGET`"
# name in a fit -> the least and the most that its number, or each number of its list, can be
LISTS = {
    "temperatures": (1e-3, 1e3),
    "biases": (-50, 50),
    "margin_weights": (-50, 50),
    "acceptance": (0, 1),
    "ece_before": (0, 1),
    "ece_after": (0, 1),
}
MAY_BE_NONE = ("ece_before", "ece_after")
NUMBERS = {
    "temperature": (0, 1e6),
    "top_k": (0, 2**31),
    "top_p": (1e-9, 1),
    "rounds": (1, 2**53),
    "held_out_rounds": (1, 2**53),
    "prompts": (2, 2**53),
}
WHOLE = ("top_k", "rounds", "held_out_rounds", "prompts")


def head_digest(head: Head) -> str:
    """A hash of the layer whose logits are calibrated, in bfloat16 as it is stored."""
    assert head.confidence_head is not None
    return hashlib.sha256(head.confidence_head.proj.weight.detach().bfloat16().float().cpu().numpy().tobytes()).hexdigest()


def as_text(calibration: Calibration) -> str:
    return json.dumps({"format": FORMAT, **asdict(calibration)}, indent=2) + "\n"


def summary(calibration: Calibration) -> str:
    """One line a law for people: ECE before and after, mean over the positions that have one."""
    return "\n".join(
        f"T = {fit.temperature:g}: expected calibration error {average(fit.ece_before):.1%} before, {average(fit.ece_after):.1%} after, "
        f"on {fit.held_out_rounds} rounds of prompts not fitted on"
        for fit in calibration.fits
    )


def doubts(calibration: Calibration) -> list[str]:
    """A warning for each law where the fit does worse than none on the prompts it was not made from."""
    errors = [(fit.temperature, average(fit.ece_before), average(fit.ece_after)) for fit in calibration.fits]
    return [
        f"warning: at T={T:g} these confidences are further from the truth than the head's own ({after:.1%} against {before:.1%}): "
        "calibrate on more prompts"
        for T, before, after in errors
        if after > before
    ]


def average(errors: Sequence[float | None]) -> float:
    known = [error for error in errors if error is not None]
    return sum(known) / len(known) if known else math.nan


def read_calibration(folder: Path, block_size: int) -> Calibration | None:
    """What the folder holds, None if nothing. Raises `HeadError` for anything else than fits of this many positions."""
    path = folder / NAME
    if not path.exists():
        return None
    raw = read_json(path, HeadError, WAY_OUT)
    names = {f.name for f in fields(Calibration)} - {"fits"}
    if not isinstance(raw, dict) or raw.keys() != names | {"format", "fits"} or not all(isinstance(raw[n], str) for n in names):
        raise HeadError(f"{path} is damaged: it is not a record with format, fits, {', '.join(sorted(names))}", WAY_OUT)
    if raw["format"] == 1 and isinstance(raw["fits"], list):  # of heads calibrated before margins were weighed
        raw["fits"] = [{**fit, "margin_weights": [0.0] * block_size} if isinstance(fit, dict) else fit for fit in raw["fits"]]
    elif raw["format"] != FORMAT:
        raise HeadError(f"{path} has format {raw['format']!r}; this version of dspark reads {FORMAT}", WAY_OUT)
    if not isinstance(raw["fits"], list) or not raw["fits"]:
        raise HeadError(f"{path} is damaged: it holds no fit", WAY_OUT)
    return Calibration(**{n: raw[n] for n in names}, fits=tuple(read_fit(fit, block_size, path) for fit in raw["fits"]))


def read_fit(raw: object, block_size: int, path: Path) -> Fit:
    if not isinstance(raw, dict) or raw.keys() != {f.name for f in fields(Fit)}:
        raise HeadError(f"{path} is damaged: a fit has {', '.join(f.name for f in fields(Fit))}", WAY_OUT)
    for name, bounds in NUMBERS.items():
        if not within(raw[name], bounds) or (name in WHOLE and type(raw[name]) is not int):
            raise HeadError(f"{path} is damaged: {name} is {raw[name]!r}", WAY_OUT)
    for name, bounds in LISTS.items():
        values = raw[name]
        if not isinstance(values, list) or len(values) != block_size:
            raise HeadError(f"{path}: {name} is {values!r}, {block_size} numbers were expected, one a drafted position", WAY_OUT)
        bad = [v for v in values if not within(v, bounds) and not (v is None and name in MAY_BE_NONE)]
        if bad:
            raise HeadError(f"{path} is damaged: {bad[0]!r} among the {name}", WAY_OUT)
    values_by_name: dict[str, Any] = {name: tuple(value) if name in LISTS else value for name, value in raw.items()}
    return Fit(**values_by_name)


def within(value: Any, bounds: tuple[float, float]) -> bool:
    return type(value) in (int, float) and bounds[0] <= value <= bounds[1]


def refuse_other_pair(calibration: Calibration, head: Head, target: Target, folder: Path) -> None:
    """Raise `HeadError` for a calibration of another head, or of another target. A target at another precision is taken
    for the same: the golden vectors have compared it, and its confidences differ little."""
    if head.confidence_head is None or calibration.head_sha256 != head_digest(head):
        raise HeadError(f"{folder / NAME} belongs to another head", WAY_OUT)
    if calibration.precision == target.precision and calibration.target_sha256 != target.digest():
        raise HeadError(f"{folder / NAME} was measured with another target than {target.name or 'this one'}: {calibration.target}", WAY_OUT)


def behind(file: Path) -> Path:
    """What is replaced when a file is written anew: of a link what it points to, so that the link stays. In the hub's cache the link itself,
    since other revisions may share what is behind it."""
    real = Path(os.path.realpath(file))
    return file if real.parent.name == "blobs" else real


def beside(file: Path) -> Path:
    """Where it is written first, in the folder in which it is then renamed."""
    real = behind(file)
    return real.with_name(f".{real.name}.new")


def refuse_unwritable(folder: Path) -> None:
    """Raise `HeadError` unless `write_calibration` can write here."""
    trial = beside(folder / NAME)
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise HeadError(
            f"cannot write to {folder}: {error.strerror}", "copy the head to a folder of your own, and calibrate that"
        ) from error


def beside_kept(found: Calibration, folder: Path, block_size: int) -> Calibration:
    """These fits, and the folder's for other settings if they are of the same pair and precision. A file that cannot be read is not kept."""
    try:
        old = read_calibration(folder, block_size)
    except HeadError:
        old = None
    if old is None or replace(old, fits=()) != replace(found, fits=()):
        return found
    new = {settings(fit) for fit in found.fits}  # they come first: of two for one temperature a request takes the first
    return replace(found, fits=(*found.fits, *(fit for fit in old.fits if settings(fit) not in new)))


def settings(fit: Fit) -> tuple[float, int, float]:
    """Of the law that it was fitted under."""
    return fit.temperature, fit.top_k, fit.top_p


def write_calibration(calibration: Calibration, folder: Path) -> None:
    """Write calibration.json beside its place and rename it. Raises `HeadError` when the disk is full or closed to us."""
    whole = beside(folder / NAME)
    try:
        whole.write_text(as_text(calibration), encoding="utf-8")
        os.replace(whole, behind(folder / NAME))
    except OSError as error:
        whole.unlink(missing_ok=True)
        raise HeadError(f"cannot write {folder / NAME}: {error.strerror}", "free some space, or make the folder writable") from error
