"""The one family of errors that a user can cause; the edge prints them once (exit 2)."""


class UserError(ValueError):
    """Something the user can put right. `hint` says how."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class TargetError(UserError):
    """The target cannot be found, loaded or rolled back."""


class HeadError(UserError):
    """The head folder is incomplete, damaged, or made for another target."""


class PromptError(UserError):
    """A prompt or a prompts file cannot be used."""


class ServerError(UserError):
    """A server that was asked for answers refuses, does not answer, or serves another model."""


class TraceError(UserError):
    """A trace, or a file of costs, cannot be replayed."""


class SettingError(UserError):
    """A setting has a value that cannot take effect."""


class LogitsError(UserError):
    """The target produced logits that define no distribution (NaN, or every token masked)."""


class RuntimeUnavailable(UserError):
    """A faster runtime cannot run this model on this machine; eager decoding can."""


class Busy(UserError):
    """The engine takes no request now: its queue is full, or it is closing."""
