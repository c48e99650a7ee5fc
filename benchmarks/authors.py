"""Times the class-to-image modules that the authors of Skip-DiT released beside ours, on the same weights and steps.

    git clone https://github.com/OpenSparseLLMs/Skip-DiT
    pip install timm
    python benchmarks/authors.py --checkout Skip-DiT --out benchmarks

`class-to-image/models.py` of the checkout is run as it is, `DiT_skip` for runs in full and `DiT_cache` for cached ones:
its cache keeps four shallow and four deep blocks, `N2-1000-20-k4` here. Weights are random, the same in both, by
`skipdit.checkpoints.to_official`. A run is so many forwards at falling timesteps, without a sampler; those of both take
turns, and are compared step by step. bfloat16 is autocast, since their embedding of timesteps is float32; ours is timed
with weights in bfloat16 too. Compiled is `model.compile()`, ours with `fullgraph=True`.
"""

import argparse
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from skipdit.benchmark.measure import fill_zeros, time_call
from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.checkpoints import to_official
from skipdit.environment import Device, describe_environment
from skipdit.files.output import output_folder
from skipdit.files.untrusted import file_digest
from skipdit.models.dit import DiT
from skipdit.models.long_skip import LongSkipConfig
from skipdit.report import Report, listed, table
from skipdit.terminal import progress_bar

INTERVALS = (2, 3)
SHALLOW = 4  # of DiT_cache, fixed in its code
NUM_CLASSES = 1000
Outputs = list[Tensor]


@dataclass(frozen=True)
class Row:
    """One kind of run of one side."""

    side: str
    """authors or skipdit"""
    weights: str
    """data type of the weights, and of products under autocast"""
    compiled: bool
    cache: str
    steps_full: int
    seconds: list[float]
    """of a run, in every round"""
    graphs: int | None = None
    breaks: int | None = None
    difference: float | None = None
    """greatest from the authors' outputs, over their greatest, at any step"""


@dataclass(frozen=True)
class Case:
    """One model that is timed."""

    side: str
    weights: str
    cache: str
    model: nn.Module
    forward: Callable[[Tensor, Tensor], Tensor]
    autocast: bool


def load_authors(checkout: Path) -> ModuleType:
    """Import the authors' models. Raises `ValueError` if they or timm are missing."""
    path = checkout / "class-to-image" / "models.py"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give --checkout of github.com/OpenSparseLLMs/Skip-DiT")
    spec = importlib.util.spec_from_file_location("skip_dit_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(f"the authors' models need a missing package ({error}): pip install timm") from error
    return module


class Pair:
    """The authors' models and ours, with the same weights, and the inputs of a run."""

    def __init__(self, authors: ModuleType, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.authors, self.options = authors, options
        self.device = torch.device(options.device)
        ours = DiT(
            num_layers=options.depth,
            num_attention_heads=options.heads,
            attention_head_dim=options.width // options.heads,
            sample_size=options.size,
            in_channels=4,
            out_channels=8,
            patch_size=2,
            num_classes=NUM_CLASSES,
            long_skip=LongSkipConfig(),
        )
        fill_zeros(ours)
        self.ours = ours.eval().requires_grad_(False)
        nn.Module.to(self.ours, self.device)
        self.weights = to_official(self.ours)
        sides = (options.batch_size, 4, options.size, options.size)
        generator = torch.Generator().manual_seed(options.seed)
        self.latents = torch.randn(sides, generator=generator).to(self.device)
        self.labels = torch.arange(options.batch_size, device=self.device) % NUM_CLASSES
        self.timesteps = torch.linspace(999, 0, options.steps).round().to(self.device)

    def of_authors(self, interval: int | None, weights: str) -> Case:
        sizes = {"input_size": self.options.size, "hidden_size": self.options.width}
        sizes |= {"depth": self.options.depth, "num_heads": self.options.heads, "num_classes": NUM_CLASSES}
        cached = {} if interval is None else {"deepcache": interval}
        kind: Any = self.authors.DiT_skip if interval is None else self.authors.DiT_cache
        model: nn.Module = kind(**sizes, **cached)
        model.load_state_dict(self.weights)
        model.eval().requires_grad_(False).to(self.device)

        def forward(latents: Tensor, timestep: Tensor) -> Tensor:
            return model(latents, timestep, self.labels)

        return Case("authors", weights, cache_name(interval), model, forward, autocast=weights == "autocast")

    def of_ours(self, interval: int | None, weights: str) -> Case:
        model: nn.Module = self.ours if weights != "bfloat16" else deepcopy(self.ours)
        if weights == "bfloat16":
            nn.Module.to(model, dtype=torch.bfloat16)
        latents_type = torch.bfloat16 if weights == "bfloat16" else torch.float32

        def forward(latents: Tensor, timestep: Tensor) -> Tensor:
            return model(latents.to(latents_type), timestep, class_labels=self.labels).sample

        return Case("skipdit", weights, cache_name(interval), model, forward, autocast=weights == "autocast")

    def run(self, case: Case) -> Outputs:
        """Return the output of each step of a run."""
        context = torch.autocast(self.device.type, torch.bfloat16) if case.autocast else nullcontext()
        with torch.inference_mode(), context:
            return [
                case.forward(self.latents, timestep.expand(len(self.latents))).float() for timestep in self.timesteps
            ]


def cache_name(interval: int | None) -> str:
    return "none" if interval is None else f"N{interval}-1000-20-k{SHALLOW}"


@contextmanager
def prepared(case: Case, *, compiled: bool) -> Iterator[None]:
    """Enable our cache and the compiler inside the block."""
    cached = case.side == "skipdit" and case.cache != "none"
    if cached:
        enable_cache(case.model, case.cache)
    if compiled:
        case.model.compile(fullgraph=case.side == "skipdit")
    try:
        yield
    finally:
        case.model._compiled_call_impl = None
        if cached:
            disable_cache(case.model)


def measure(pair: Pair, cases: Sequence[Case], *, compiled: bool, rounds: int) -> list[Row]:
    """Warm up and compare the two sides of one kind of run, then time them in turn."""
    device: Device = "cuda" if pair.device.type == "cuda" else "cpu"
    rows: list[Row] = []
    seconds: list[list[float]] = [[] for _ in cases]
    reference: Outputs | None = None
    with ExitStack() as stack:
        for case in cases:
            stack.enter_context(prepared(case, compiled=compiled))
        for case in cases:
            counters.clear()
            pair.run(case)
            outputs = pair.run(case)
            stats = [counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())] if compiled else None
            reference = outputs if reference is None else reference
            scale = max(output.abs().max().item() for output in reference)
            difference = max((a - b).abs().max().item() for a, b in zip(outputs, reference, strict=True)) / scale
            steps_full = pair.options.steps
            if case.cache != "none":
                steps_full = -(-pair.options.steps // int(case.cache[1]))  # theirs does not tell
                if case.side == "skipdit":
                    counted = cache_summary(case.model).steps_full
                    assert counted == steps_full, (counted, steps_full)
            graphs, breaks = stats or (None, None)
            rows.append(Row(case.side, case.weights, compiled, case.cache, steps_full, [], graphs, breaks, difference))
        for turn in range(rounds):
            order = range(len(cases)) if turn % 2 == 0 else reversed(range(len(cases)))
            for index in order:
                seconds[index].append(time_call(partial(last_output, pair, cases[index]), device)[0])
    return [replace(row, seconds=times) for row, times in zip(rows, seconds, strict=True)]


def last_output(pair: Pair, case: Case) -> Tensor:
    return pair.run(case)[-1]


def cells(row: Row, rows: Sequence[Row]) -> dict[str, object]:
    """Return a row of the table. Ratios are the median over rounds, in which both sides took turns."""

    def over(other: Row) -> float:
        return median(a / b for a, b in zip(other.seconds, row.seconds, strict=True))

    weights = "autocast" if row.weights == "bfloat16" else row.weights
    settings = ("authors", row.compiled, row.cache, weights)
    authors = next(other for other in rows if (other.side, other.compiled, other.cache, other.weights) == settings)
    milliseconds = [1e3 * seconds for seconds in row.seconds]
    return {
        "weights": row.weights,
        "compiled": "yes" if row.compiled else "",
        "cache": row.cache,
        "side": row.side,
        "ms per run": f"{median(milliseconds):.0f} ({min(milliseconds):.0f} to {max(milliseconds):.0f})",
        "times as fast as the authors'": "" if row.side == "authors" else f"{over(authors):.2f}",
        "graphs / breaks": "" if row.graphs is None else f"{row.graphs} / {row.breaks}",
        "difference": "" if row.side == "authors" else f"{row.difference:.1e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="folder of the authors' repository")
    parser.add_argument("--depth", type=int, default=28, help="blocks; a cached step runs eight of them")
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="how often each run is timed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--no-compile", action="store_true", help="leave out compiled runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    options = parser.parse_args()
    try:
        authors = load_authors(options.checkout)
        if options.width % options.heads or options.depth % 2 or options.depth <= 2 * SHALLOW:
            raise ValueError(f"width must be heads times something, depth even and above {2 * SHALLOW}")
    except ValueError as error:
        parser.error(str(error))
    pair = Pair(authors, options)
    kinds = list(itertools.product((False,) if options.no_compile else (False, True), options.dtypes))
    rows: list[Row] = []
    with output_folder(options.out, "bench") as out, progress_bar() as bar:
        out.claim(("authors.json", "authors.md"))
        task = bar.add_task("runs", total=len(kinds) * (1 + len(INTERVALS)))
        for (compiled, dtype), interval in itertools.product(kinds, (None, *INTERVALS)):
            torch._dynamo.reset()
            names = ("float32",) if dtype == "float32" else ("autocast", "bfloat16")
            cases = [pair.of_authors(interval, names[0]), *(pair.of_ours(interval, name) for name in names)]
            rows += measure(pair, cases, compiled=compiled, rounds=options.rounds)
            bar.advance(task)
        digest = file_digest(options.checkout / "class-to-image" / "models.py")
        shape = f"{options.depth} blocks of width {options.width}, {options.heads} heads, latents {options.size}², "
        facts = {
            "authors' code": f"class-to-image/models.py, sha256 {digest[:16]}; DiT_skip, cached DiT_cache",
            "model": f"{shape}batch {options.batch_size}; random weights, the same in both",
            "run": f"{options.steps} forwards at falling timesteps, no sampler; {options.rounds} rounds in turn, "
            "median (least to most)",
            "load": f"{os.getloadavg()[1]:.1f} processes in the mean of five minutes, on {os.cpu_count()} cores",
            "difference": "greatest of any step from the authors' output of the same weights, over its greatest value",
        }
        Report(
            config={key: value for key, value in vars(options).items() if key not in ("out", "checkout")},
            environment=describe_environment(options.device, options.seed),
            data={"rows": [asdict(row) for row in rows], "authors_sha256": digest},
            title="The authors' modules beside ours",
            parts=[listed(facts), table([cells(row, rows) for row in rows])],
        ).write(out, "authors")
    print(f"written: {options.out / 'authors.md'}, authors.json")


if __name__ == "__main__":
    main()
