"""`skipdit bench`: the cost and the effect of steps, caches, conversion, compilation and training."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from skipdit.command_options import OutputOptions, parse
from skipdit.commands.benches import BENCHES
from skipdit.files.output import output_folder
from skipdit.options import choose


@dataclass(frozen=True, kw_only=True)
class BenchOutput(OutputOptions):
    """Where the tables go."""

    out: Path = Path("out/bench")
    """folder of the .md, .json and .png"""


def bench(arguments: Sequence[str]) -> None:
    """Measure what steps, caches, conversion, compilation and training cost, each beside its baseline.

    Example: skipdit bench models --presets DiT-S/2
    Example: skipdit bench cache --model emoji
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: skipdit bench {{{','.join(BENCHES)}}} [OPTIONS]\n\n{inspect.cleandoc(bench.__doc__ or '')}\n")
        for name, (_, run) in BENCHES.items():
            print(f"  {name:<12}{(run.__doc__ or '').splitlines()[0]}")
        return
    name, *rest = arguments or ("none",)
    choose("the benchmark", name, BENCHES)
    config, run = BENCHES[name]
    field = ("config", Annotated[config, tyro.conf.arg(name="")])
    kind: Any = make_dataclass("Options", [field], bases=(BenchOutput,), frozen=True, kw_only=True)
    options = parse(
        f"bench {name}",
        f"{run.__doc__}\n\nExample: skipdit bench {name}",
        rest,
        kind,
        kind(config=config()),
    )
    with output_folder(options.out, "bench", overwrite=options.overwrite) as out:
        run(options.config, out)
    print(f"written: {options.out}")
