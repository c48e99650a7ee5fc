"""Lets pages link to files of the repository, such as ../benchmarks/compile.md: on the site, those links lead to the
repository, which is named by `repo_url` in mkdocs.yml, or else they are plain text."""

import re
from typing import Any

LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+(?:benchmarks|src|tests|README|CHANGELOG|CONTRIBUTING|NOTICE)[^)]*)\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Rewrite links that leave the folder of the documentation."""
    base = config.repo_url

    def replaced(found: re.Match[str]) -> str:
        is_picture, text, path = found.groups()
        target = path.lstrip("./")
        if not base:
            return text if is_picture else f"{text} (`{target}`)"
        return f"[{text}]({base.rstrip('/')}/blob/main/{target})"

    return LINK.sub(replaced, markdown)
