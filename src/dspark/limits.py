"""What the settings of a request may be, in Python's names or in another caller's. Imports no torch: the command line asks before anything
is loaded."""

from collections.abc import Callable, Sequence

from dspark.core.planner import always
from dspark.errors import SettingError

MIN_TEMPERATURE = 1e-4  # below it, logits overflow float32 instead of becoming greedy
DRAFTERS = ("auto", "dspark", "dflash", "mtp", "eagle3", "mtp+dspark", "lookup", "none")
PLANS = ("auto", "online", "fixed", "length:N", "threshold:P", "early-stop", "lagged")
ADAPTIVE = ("auto", "online")


def check_law(
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    called: Callable[[str], str] = str,
) -> None:
    """Raises `SettingError` for values without meaning, by the name that the setting is `called`."""
    for name, value, ok, rule in (
        (
            "temperature",
            temperature,
            temperature == 0 or MIN_TEMPERATURE <= temperature < float("inf"),
            f"0 (greedy) or at least {MIN_TEMPERATURE:g}",
        ),
        ("top_k", top_k, isinstance(top_k, int) and top_k >= 0, "0 (off) or a positive count"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("min_p", min_p, 0 <= min_p <= 1, "between 0 and 1"),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < float("inf"), "a positive number, 1 for none"),
    ):
        if not ok:
            raise SettingError(f"{called(name)} is {value}", f"{called(name)} must be {rule}")


def check_settings(max_new_tokens: int, seed: int, stop: Sequence[str], called: Callable[[str], str] = str) -> None:
    """The same of settings beside the law, whatever the target and the prompt are."""
    if max_new_tokens < 1:
        raise SettingError(f"{called('max_new_tokens')} is {max_new_tokens}", "ask for at least 1 new token")
    if not isinstance(seed, int) or not 0 <= seed < 2**61:
        raise SettingError(f"{called('seed')} is {seed}", "seeds are whole numbers from 0 to 2**61 - 1")
    if any(not s for s in stop):
        raise SettingError("a stop string is empty", "leave it out")


def check_names(drafter: str | None = None, plan: str | None = None) -> None:
    """Raises `SettingError` for a drafter or a plan that is none, whatever the target and the head are."""
    if drafter is not None and drafter not in DRAFTERS:
        raise SettingError(f"unknown drafter {drafter!r}", f"choose one of {', '.join(DRAFTERS)}")
    if plan is not None and plan not in (*ADAPTIVE, "early-stop", "lagged") and always(plan) is None:
        raise SettingError(
            f"unknown plan {plan!r}", f"choose one of {', '.join(PLANS)}; N is a number of tokens, P a chance of survival from 0 to 1"
        )


def check_length(plan: str, block_size: int) -> None:
    """Raises `SettingError` for a plan length:N of more tokens than a draft of `block_size` has: it would be `fixed` under another name."""
    lengths = always(plan)
    if lengths is not None and (lengths.length or 0) > block_size:
        raise SettingError(
            f"plan {plan!r} asks for more tokens than are ever drafted: at most {block_size} here",
            f"use length:{block_size}, or fixed for all that is drafted",
        )
