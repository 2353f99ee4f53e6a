"""Options of a verb, in any order. A mistake is one message with the way out, as every other of a user's."""

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn

from dspark.errors import SettingError

OPTION = re.compile(r"-(?![\d.])[^\s]+")  # what stands where a number, a text with blanks or a lone dash does not


class Parser(argparse.ArgumentParser):
    """argparse's, which raises `SettingError` for what it cannot read."""

    def error(self, message: str) -> NoReturn:
        raise SettingError(message, f"see `{self.prog} --help`")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        self.refuse_unknown(arguments)
        options, left = self.parse_known_intermixed_args(arguments)
        if left:
            self.error(f"{left[0]!r} is one argument too many")
        return options

    def refuse_unknown(self, arguments: Sequence[str]) -> None:
        """An option that does not exist is told before one that is missing: it may be the same, mistyped."""
        known = self._option_string_actions
        for before, argument in zip(["", *arguments], arguments, strict=False):
            if argument == "--":  # texts from here on
                return
            name = argument.partition("=")[0]
            if not OPTION.fullmatch(name) or any(option.startswith(name) or option == name[:2] for option in known):
                continue
            if before in known and known[before].nargs is None:
                raise SettingError(
                    f"{before} needs a value, and {argument} reads as an option", f"if it is the value, write {before}={argument}"
                )
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            raise SettingError(f"there is no option {name}", f"{f'the nearest is {near[0]}; ' if near else ''}see `{self.prog} --help`")
