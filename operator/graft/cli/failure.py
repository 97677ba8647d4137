"""The failure of a command: what happened, and what to do."""


class CliFailure(Exception):
    """A failure with a known cause. Its text says what happened; `remedy` says what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy
