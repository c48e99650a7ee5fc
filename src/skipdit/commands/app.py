"""`skipdit app`: a page in the browser."""

from collections.abc import Sequence

from skipdit.app.config import AppOptions
from skipdit.command_options import parse
from skipdit.options import check_installed


def app(arguments: Sequence[str]) -> None:
    """Open a page on this machine: full and cached results side by side, quality and speed, stability.

    Nobody else can reach it, unless --host says so.

    Example: skipdit app --models runs/emoji/pipeline
    """
    options = parse("app", app.__doc__, arguments, AppOptions)
    check_installed("the page needs", "app", "gradio", "markdown_it")
    from skipdit.app.server import serve

    serve(options)
