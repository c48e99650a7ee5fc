"""`skipdit eval`: how far samples are from a reference, as sets or one by one."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from skipdit.command_options import OutputOptions, config_of, parse
from skipdit.evaluation.config import EvalConfig
from skipdit.files.output import OutputFolder, output_folder


@dataclass(frozen=True, kw_only=True)
class EvalOptions(EvalConfig, OutputOptions):
    """What is compared, by what, and where the report goes."""

    samples: tyro.conf.Positional[str]
    """an .npz of uint8 (n h w 3) or (n f h w 3), as `skipdit sample --npz` and ADM write it; a folder of pictures or
    clips; a .parquet file; emoji or emoji-clips; or statistics of --save-reference"""
    save_reference: Path | None = None
    """write the statistics of the reference to this .safetensors file, which may be the reference of later runs"""
    vbench: Path | None = None
    """write the samples, clips with prompts, to this folder as VBench names them, prompt-index.mp4; without
    --reference nothing else is done, unless --metrics asks for clip alone"""
    fps: float = 8.0
    """frames per second of the clips for VBench"""
    out: Path = Path("out/eval")
    """folder of eval.md and eval.json"""

    GROUPS: ClassVar = {
        "sets": ("reference", "num_samples", "image_size", "kind", "column", "num_frames", "frame_interval", "seed"),
        "metrics": ("paired", "metrics", "extractor", "resize", "size", "clip", "lpips"),
        "machine": ("batch_size", "device"),
        "output": ("out", "overwrite", "save_reference", "vbench", "fps"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_reference is not None and (self.paired or self.save_reference.suffix != ".safetensors"):
            raise ValueError(
                f"save_reference is a .safetensors file, of sets that are not paired, got {self.save_reference}"
            )
        if self.save_reference is not None and not self.needs_reference:
            raise ValueError("save_reference needs a metric of sets: clip alone looks at no reference")
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps must be above 0 and at most 1000, got {self.fps}")


def eval(arguments: Sequence[str]) -> None:
    """Measure how far samples are from a reference: Fréchet and kernel distances, precision, recall, PSNR and more.

    Every figure is shown beside that of two halves of the reference. Several processes of torchrun give the same
    figures as one.

    Example: skipdit eval out/emoji-5k/samples.npz --reference emoji --out out/eval
    Example: skipdit eval cached.npz --reference full.npz --paired
    Example: skipdit eval samples.npz --reference VIRTUAL_imagenet256_labeled.npz --extractor inception=weights.pth
    """
    options = parse("eval", eval.__doc__, arguments, EvalOptions)
    config = config_of(options, EvalConfig)
    from skipdit.evaluation.evaluate import Evaluator, open_items, write_report
    from skipdit.files.output import atomic_file
    from skipdit.metrics.statistics import check_may_be_replaced
    from skipdit.process_group import process_group

    with process_group() as group, ExitStack() as held:
        if options.vbench is not None:
            from skipdit.evaluation.vbench import write_vbench

            items, folder = open_items(options.samples, config), options.vbench
            count = group.from_main(lambda: write_vbench(items, folder, options.fps))
            print(f"written: {count:,} clips in {folder}") if group.is_main else None
            if config.reference is None and config.needs_reference:
                return
        folders: list[OutputFolder] = []
        opened = output_folder(options.out, "eval", overwrite=options.overwrite)
        group.from_main(lambda: folders.append(held.enter_context(opened)))
        group.from_main(lambda: folders[0].claim(["eval.md", "eval.json"]))
        if (saved := options.save_reference) is not None:
            group.from_main(lambda: check_may_be_replaced(saved))
        evaluator = Evaluator(config, group)
        if options.save_reference is None:
            found = evaluator(options.samples)
        else:
            with ExitStack() as writing:
                path = writing.enter_context(atomic_file(options.save_reference)) if group.is_main else Path()
                found = evaluator(options.samples, path)
        if group.is_main:
            write_report(found, config, folders[0])
            print((options.out / "eval.md").read_text(encoding="utf-8").partition("\n## ")[2].partition("\n")[2])
            print(f"written: {options.out / 'eval.md'}, eval.json")
