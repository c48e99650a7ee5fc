"""The options of `skipdit app`; nothing heavy is imported, so that its help appears at once."""

from dataclasses import dataclass
from pathlib import Path

from skipdit.options import DTypeName, check_range


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """What the page offers, and its address."""

    models: tuple[str, ...] = ()
    """folders of pipelines (of skipdit or of diffusers) or checkpoints, to be offered beside the bundled models; the
    page reads no others"""
    dtype: DTypeName = "float32"
    """of the weights and the computation of these models"""
    results: tuple[Path, ...] = (Path("out"), Path("out/bench"), Path("benchmarks"), Path("docs"))
    """folders that are searched for the reports of skipdit bench cache and skipdit analyze"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one"""
    host: str = "127.0.0.1"
    """address to serve at: by default only this machine can reach it; 0.0.0.0 lets everyone in, without a password"""
    port: int = 7860
    """port to serve at; 0 for any that is free"""

    def __post_init__(self) -> None:
        check_range(self, "port", least=0, most=65535)
