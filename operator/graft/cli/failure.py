"""How a command fails: what happened, and what to do."""


class CliFailure(Exception):
    """A failure whose cause is known; its text says what happened."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy
