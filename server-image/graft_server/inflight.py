"""The bytes of requests and answers that a server holds, bounded over all requests and for each caller (PURE)."""

from collections.abc import Sequence
from typing import NamedTuple

REQUEST_BYTES = 16 * 1024  # counted for every request: its objects, its head, its share of buffers
NARROW = bytes(range(0xF0))  # all bytes of UTF-8, without the first of a character that needs 4 bytes in memory
VALUE_BYTES = 96  # counted for every value of JSON: the size of a Python object


class Full(Exception):
    """An account cannot hold these bytes now. `account` is that account.

    `never`: the request alone needs more than the account allows, so it must not be repeated.
    """

    def __init__(self, account: "Account", used: int, wanted: int, *, never: bool) -> None:
        super().__init__(
            f"the requests in flight of {account.whose} hold {used} bytes, and this one needs {wanted} more; "
            f"at most {account.most} are allowed at once"
        )
        self.account = account
        self.never = never


class Account(NamedTuple):
    """One caller, or all of them. Two accounts with the same name are the same."""

    name: str
    whose: str  # for people; it holds no secret
    most: int  # bytes at once
    shared: bool = False  # by all callers


class InFlight:
    """The bytes in flight, by account."""

    def __init__(self) -> None:
        self._used: dict[str, int] = {}

    def used(self, name: str) -> int:
        """Return the bytes in flight of an account."""
        return self._used.get(name, 0)

    def begin(self, accounts: Sequence[Account]) -> "Share":
        """Begin a request. Raises Full. `close` must follow."""
        share = Share(self, accounts)
        share.add(REQUEST_BYTES)
        return share

    def _add(self, accounts: Sequence[Account], count: int, held: int) -> None:
        for account in accounts:
            if self.used(account.name) + count > account.most:
                raise Full(account, self.used(account.name), count, never=held + count > account.most)
        for account in accounts:
            self._used[account.name] = self.used(account.name) + count

    def _remove(self, accounts: Sequence[Account], count: int) -> None:
        for account in accounts:
            left = self._used[account.name] - count
            if left:
                self._used[account.name] = left
            else:
                del self._used[account.name]


class Share:
    """The bytes of one request."""

    def __init__(self, whole: InFlight, accounts: Sequence[Account]) -> None:
        self._whole = whole
        self._accounts = tuple(accounts)
        self._held = 0

    def add(self, count: int) -> None:
        """Count more bytes. Raises Full, and counts nothing then."""
        self._whole._add(self._accounts, count, self._held)
        self._held += count

    def remove(self, count: int) -> None:
        """Stop counting some of the bytes."""
        self._whole._remove(self._accounts, count)
        self._held -= count

    def close(self) -> None:
        """Stop counting the request."""
        if self._held:
            self.remove(self._held)


def weight(body: bytes, values: int) -> int:
    """Return the bytes that the objects of a body may need in addition to the body. This takes almost no time.

    `values` is the number of values beyond which the body is refused. Every value stands behind a comma or a bracket.
    Commas and brackets inside strings count, too, so the result is an upper bound. Python keeps a text with one wide
    character in 4 bytes for each character.
    """
    count = min(values, body.count(b",") + body.count(b"[") + body.count(b"{"))
    wide = b"\\u" in body or (not body.isascii() and body.translate(None, NARROW))
    return VALUE_BYTES * count + len(body) * (3 if wide else 0 if body.isascii() else 1)
