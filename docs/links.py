"""Puts the pages and pictures of benchmarks/ on the site, and lets pages link to other files of the repository: those
links lead to `repo_url` of mkdocs.yml if it is set, and are plain text otherwise."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

MEASURED = re.compile(r"\]\((\.\./)((?:\.\./)*benchmarks/[^)]*\.(?:md|png)[^)]*)\)")
ELSEWHERE = r"benchmarks/[^)]*\.(?:py|jsonl?)|src|tests|README|CHANGELOG|CONTRIBUTING|NOTICE"
OTHER = re.compile(rf"(!?)\[([^\]]*)\]\(((?:\.\./)+(?:{ELSEWHERE})[^)]*)\)")


def on_files(files: Any, *, config: Any, **_: Any) -> Any:
    """Add what was measured."""
    folder = Path(config.docs_dir).parent / "benchmarks"
    for path in sorted((*folder.rglob("*.md"), *folder.rglob("*.png"))):
        files.append(
            File.generated(config, f"benchmarks/{path.relative_to(folder).as_posix()}", abs_src_path=str(path))
        )
    return files


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Rewrite links that leave the folder of the documentation."""
    base = config.repo_url

    def replaced(found: re.Match[str]) -> str:
        is_picture, text, path = found.groups()
        target = path.lstrip("./")
        if not base:
            return text if is_picture else f"{text} (`{target}`)"
        return f"[{text}]({base.rstrip('/')}/blob/main/{target})"

    return OTHER.sub(replaced, MEASURED.sub(r"](\2)", markdown))
