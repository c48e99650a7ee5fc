"""Shows the parameters of skipdit's docstrings as lists: lines `name: text` about a function's own parameters become
items. Docstrings with an `Args:` section are left to the parser."""

import re
from typing import Any

import griffe

ITEM = re.compile(r"^((?:\w+(?:, )?)+): (.*)$")


class ParameterLists(griffe.Extension):
    """An extension of griffe, which reads the docstrings for the API pages."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """Rewrite the docstring of a function."""
        if func.docstring is None or re.search(r"^Args:$", func.docstring.value, re.MULTILINE):
            return
        names = {parameter.name for parameter in func.parameters}
        lines: list[str] = []
        is_item = False
        for line in func.docstring.value.splitlines():
            found = ITEM.match(line)
            if found and set(found[1].split(", ")) <= names:
                listed = ", ".join(f"`{name}`" for name in found[1].split(", "))
                lines += ([] if is_item else [""]) + [f"- {listed}: {found[2]}"]
                is_item = True
                continue
            if is_item and line.startswith("    "):
                line = f"  {line.strip()}"
            elif is_item and line.strip():
                lines.append("")
                is_item = False
            lines.append(line)
        func.docstring.value = "\n".join(lines)
