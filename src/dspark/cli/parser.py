"""Options of a verb, in any order. A mistake is one message with the way out, as every other of a user's."""

import argparse
import difflib
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from dspark.errors import SettingError

OPTION = re.compile(r"-[^\s]+")  # what stands where a text with blanks or a lone dash does not
NUMBER_FIRST = re.compile(r"-[\d.]")  # a number, or a text that begins with one
# What an option that must not be empty shows: as a folder it would be the current one, as a key none at all.
NAMES = ("TARGET", "HEAD", "DIR", "SRC", "DST", "FILE", "FILE.jsonl", "TRACE", "NAME", "URL", "KEY", "DEVICE")
NEAR = 0.7  # of difflib's ratio of the names without their dashes; --taps and --mtp come to 0.57


class Parser(argparse.ArgumentParser):
    """argparse's, which raises `SettingError` for what it cannot read. `having` tells which other verbs know an option."""

    having: Callable[[str], list[str]] = staticmethod(lambda name: [])

    def error(self, message: str) -> NoReturn:
        raise SettingError(message, f"see `{self.prog} --help`")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        self.refuse_unknown(arguments)
        options, left = self.parse_known_intermixed_args(arguments)
        if left:
            self.error(f"{left[0]!r} is one argument too many")
        return options

    def refuse_unknown(self, arguments: Sequence[str]) -> None:
        """An option that does not exist is told before one that is missing: it may be the same, mistyped. What reads as an option
        and may be a text is told the form in which it is one."""
        known = self._option_string_actions
        for before, argument in zip(["", *arguments], arguments, strict=False):
            wants = known.get(before)
            if wants is not None and wants.nargs is None and (argument == "--" or self._parse_optional(argument) is not None):
                reads = "ends the options" if argument == "--" else "reads as an option"
                raise SettingError(
                    f"{before} needs a value, and {argument} {reads}", f"if it is the value, write {shlex.quote(f'{before}={argument}')}"
                )
            if argument == "--":  # texts from here on
                return
            name = argument.partition("=")[0]
            if {"-h", "--help"} & {*arguments} or not OPTION.fullmatch(name) or self._negative_number_matcher.match(argument):
                continue
            if name in known or (name.startswith("--") and any(option.startswith(name) for option in known)):
                continue
            if NUMBER_FIRST.match(name):
                raise SettingError(
                    f"{argument} reads as an option, and there is none", f"if it is a text, write it behind --: -- {shlex.quote(argument)}"
                )
            raise SettingError(f"there is no option {name}", f"{self.told(name)}see `{self.prog} --help`")

    def told(self, name: str) -> str:
        """Where an option of this name is, or one that may have been meant."""
        if verbs := self.having(name):
            return f"{' and '.join([', '.join(verbs[:-1]), verbs[-1]] if verbs[1:] else verbs)} ha{'ve' if verbs[1:] else 's'} it; "
        bare = {option.lstrip("-"): option for option in self._option_string_actions}
        near = difflib.get_close_matches(name.lstrip("-"), bare, n=1, cutoff=NEAR)
        return f"the nearest is {bare[near[0]]}; " if near else ""

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """As argparse's, of which some take the value in --stop=-- for the end of the options; an empty folder, name or key is refused."""
        if action.metavar in NAMES and "" in arg_strings:
            name = action.option_strings[0] if action.option_strings else action.metavar
            raise SettingError(f"{name} is empty", "give one; a variable of the shell that is not set reads like this")
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)
