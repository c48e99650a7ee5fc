"""Measures whether a cache should extrapolate on a model that quantizes activations, or hold what it stored.

    python benchmarks/quantized_activations.py --out benchmarks

All linear layers of the units of the bundled class-to-image model are given weights and inputs that were rounded to a
format and back, which is what layers of that format compute but for the order of their sums: `int8` as torchao's
dynamic config (a scale per token, and per output channel of weights), `fp8` as e4m3 with one scale per tensor, `fp4` as
NVFP4 (e2m1, a scale in e4m3 per 16 entries). Each row has a cache with held values (order 0) and with extrapolated ones
(order 1), in dB of PSNR to the full run of the same quantized model, and an uncached run of fewer steps that costs no
less. *Own dB* is the quantized full run beside that in float32.
Settings that the .json in `--out` already has are not measured again. `--report` only writes the table anew.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipdit.environment import check_device, describe_environment
from skipdit.files.output import output_folder
from skipdit.loading import Source, load_source
from skipdit.metrics.paired import psnr_db
from skipdit.report import Report, table
from skipdit.runs import OwnCache, Runner

NAME = "quantized_activations"
SPECS = ("auto:1.5", "auto:2", "auto:2.5", "skip-taylor:N2", "skip-taylor:N3")
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4_BLOCK = 16


@dataclass(frozen=True)
class Row:
    """psnr_db: of orders 0 and 1. own_db: of the full run to that in float32."""

    format: str
    cache: str
    compute_ratio: float
    held_db: float
    extrapolated_db: float
    fewer_steps: int
    fewer_db: float
    own_db: float | None


def whole(values: Tensor) -> Tensor:
    return values


def int8(values: Tensor) -> Tensor:
    """Round the last axis, one scale per row."""
    scale = values.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
    return (values / scale).round() * scale


def fp8(values: Tensor) -> Tensor:
    scale = values.abs().amax().clamp(min=1e-12) / 448
    return (values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale


def fp4(values: Tensor) -> Tensor:
    padded = nn.functional.pad(values, (0, -values.shape[-1] % FP4_BLOCK))
    blocks = padded.unflatten(-1, (-1, FP4_BLOCK))
    largest = blocks.abs().amax().clamp(min=1e-12) / (6 * 448)
    scale = (blocks.abs().amax(dim=-1, keepdim=True) / 6 / largest).to(torch.float8_e4m3fn).to(values.dtype) * largest
    levels = FP4.to(values)
    bounds = (levels[1:] + levels[:-1]) / 2
    places = torch.bucketize((blocks / scale.clamp(min=1e-12)).abs(), bounds)
    return (levels[places] * blocks.sign() * scale).flatten(-2)[..., : values.shape[-1]]


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {"float32": whole, "int8": int8, "fp8": fp8, "fp4": fp4}


@contextmanager
def quantized(model: nn.Module, rounded: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Round the weights and inputs of the linear layers in the model's units inside the block."""
    layers = [layer for layer in model.get_submodule("blocks").modules() if isinstance(layer, nn.Linear)]
    kept = [layer.weight.detach().clone() for layer in layers]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),)) for layer in layers]
    try:
        for layer in layers:
            layer.weight.data = rounded(layer.weight.data)
        yield
    finally:
        for layer, weight, hook in zip(layers, kept, hooks, strict=True):
            layer.weight.data = weight
            hook.remove()


def decibel(samples: Tensor, reference: Tensor) -> float:
    return min(psnr_db(samples, reference).mean().item(), 99.9)


def measure(source: Source, options: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """Yield what is missing."""
    pipeline = source.sampler.pipeline
    pipeline.set_progress_bar_config(disable=True)
    conditions, _ = source.choose({}, options.num_samples)
    run = Runner.of(
        source.sampler,
        conditions,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        seed=options.seed,
    )
    done = {(row.format, row.cache) for row in known}
    missing = {name: [spec for spec in options.specs if (name, spec) not in done] for name in options.formats}
    exact = run().samples if any(missing.values()) else None
    for name, specs in missing.items():
        with quantized(pipeline.transformer, FORMATS[name]):
            full = run().samples if specs else None
            for spec in specs:
                assert full is not None
                assert exact is not None
                held, extrapolated = (run(OwnCache.of(each)) for each in (f"{spec}-o0", spec))
                fewer = math.ceil(options.steps / held.compute_ratio)
                row = Row(
                    format=name,
                    cache=spec,
                    compute_ratio=held.compute_ratio,
                    held_db=decibel(held.samples, full),
                    extrapolated_db=decibel(extrapolated.samples, full),
                    fewer_steps=fewer,
                    fewer_db=decibel(run(num_inference_steps=fewer).samples, full),
                    own_db=None if name == "float32" else decibel(full, exact),
                )
                print(row, flush=True)
                yield row


def cells(row: Row) -> dict[str, object]:
    return {
        "format": row.format,
        "own dB": "" if row.own_db is None else f"{row.own_db:.1f}",
        "cache": row.cache,
        "compute": f"{row.compute_ratio:.2f}",
        "held dB": f"{row.held_db:.1f}",
        "extrapolated dB": f"{row.extrapolated_db:.1f}",
        "gain dB": f"{row.extrapolated_db - row.held_db:+.1f}",
        "fewer steps": row.fewer_steps,
        "dB": f"{row.fewer_db:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", help="a class-to-image model of skipdit")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--specs", nargs="+", default=list(SPECS), help="caches that take -o0")
    parser.add_argument("--num-samples", type=int, default=8, help="pictures per run")
    parser.add_argument("--steps", type=int, default=50, help="of a run")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of guidance")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the .json and .md")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    check_device(options.device)
    with output_folder(options.out, "bench") as out:
        path = out.path / f"{NAME}.json"
        kept: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"rows": []}
        rows = [Row(**row) for row in kept["rows"]]
        settings = {name: getattr(options, name) for name in ("model", "num_samples", "steps", "guidance", "seed")}
        if rows and not options.report and kept["config"] != settings:
            raise SystemExit(f"{path} was measured with other settings: give another --out")

        def write() -> None:
            order = list(FORMATS)
            rows.sort(key=lambda row: (order.index(row.format), row.cache))
            report = Report(
                title="Caches on quantized activations",
                config=kept["config"] if options.report else settings,
                environment=kept["environment"] if options.report else describe_environment(options.device, 0),
                data={"rows": [asdict(row) for row in rows]},
                parts=[(__doc__ or "").partition("\n\n    python")[0], table([cells(row) for row in rows])],
            )
            report.write(out, NAME)

        if not options.report:
            for row in measure(load_source(options.model, device=options.device), options, rows):
                rows.append(row)
                write()
        write()
    print(f"written: {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
