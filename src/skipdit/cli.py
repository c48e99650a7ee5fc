"""The command line: finds the command and says in one line what went wrong. `commands/` has one file per command."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence

from skipdit import terminal
from skipdit.commands.analyze import analyze
from skipdit.commands.app import app
from skipdit.commands.bench import bench
from skipdit.commands.calibrate import calibrate
from skipdit.commands.convert import convert
from skipdit.commands.ema import ema
from skipdit.commands.eval import eval
from skipdit.commands.info import info
from skipdit.commands.latents import latents
from skipdit.commands.sample import sample
from skipdit.commands.train import train
from skipdit.options import choose

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    command.__name__: command
    for command in (sample, train, ema, latents, convert, analyze, calibrate, eval, bench, info, app)
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A user's mistake ends in one line and exit status 2; SKIPDIT_TRACEBACK=1 shows its traceback.

    Ctrl-C ends in status 130, SIGTERM in 143, a stdout that nobody reads in 141.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with terminal.messages():
        try:
            try:
                _run(*arguments)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            sys.exit(terminal.drop_output())
        except KeyboardInterrupt as stopped:
            sys.exit(terminal.say_stopped(stopped))
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if os.environ.get("SKIPDIT_TRACEBACK") or not terminal.is_expected(error):
                raise
            print(f"skipdit: error: {terminal.describe(error)}", file=sys.stderr)
            sys.exit(2)


def _run(command: str = "--help", *arguments: str) -> None:
    if command in ("-h", "--help"):
        listing = "\n".join(f"  {name:<10}{(run.__doc__ or '').splitlines()[0]}" for name, run in COMMANDS.items())
        print(f"usage: skipdit COMMAND [OPTIONS]\n\nDiffusion transformers with caches and long skips.\n\n{listing}\n")
        print("`skipdit COMMAND --help` shows its options.")
        return
    choose("the command", command, COMMANDS)
    with contextlib.nullcontext() if command == "train" else terminal.terminable():
        COMMANDS[command](arguments)
