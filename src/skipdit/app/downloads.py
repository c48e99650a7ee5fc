"""What the server keeps of what pages made, found by names that nobody can guess: files for download, which are bytes
in memory, and samples. Only the last ones of all pages together stay."""

import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

NUM_KEPT = 16
PREFIX = "/download/"


@dataclass(frozen=True)
class Download:
    name: str
    content: bytes
    kind: str
    """media type"""


Value = TypeVar("Value")


class Latest(Generic[Value]):
    """The last values that were added."""

    def __init__(self, num_kept: int) -> None:
        self.num_kept = num_kept
        self.kept: OrderedDict[str, Value] = OrderedDict()

    def keep(self, value: Value) -> str:
        """Keep a value, drop those that are too many, and return the token with which `get` finds it."""
        token = secrets.token_urlsafe(16)
        self.kept[token] = value
        while len(self.kept) > self.num_kept:
            self.kept.popitem(last=False)
        return token

    def get(self, token: str) -> Value | None:
        return self.kept.get(token)


class Downloads(Latest[Download]):
    """The last files that were made for download."""

    def __init__(self) -> None:
        super().__init__(NUM_KEPT)

    def add(self, name: str, content: bytes, kind: str) -> str:
        """Keep a file, and return where it is found."""
        return f"{PREFIX}{self.keep(Download(name, content, kind))}/{name}"
