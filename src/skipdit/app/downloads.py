"""Files for download: bytes in memory under names that nobody can guess; nothing is read from disk."""

import secrets
from collections import OrderedDict
from dataclasses import dataclass

NUM_KEPT = 16
PREFIX = "/download/"


@dataclass(frozen=True)
class Download:
    name: str
    content: bytes
    kind: str
    """media type"""


class Downloads:
    """The latest files for download."""

    def __init__(self) -> None:
        self.kept: OrderedDict[str, Download] = OrderedDict()

    def add(self, name: str, content: bytes, kind: str) -> str:
        """Keep a file, and return its URL."""
        token = secrets.token_urlsafe(16)
        self.kept[token] = Download(name, content, kind)
        while len(self.kept) > NUM_KEPT:
            self.kept.popitem(last=False)
        return f"{PREFIX}{token}/{name}"

    def get(self, token: str) -> Download | None:
        return self.kept.get(token)
