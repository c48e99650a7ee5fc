"""Parses the options of a command, and defines those that several commands share; nothing heavy is imported."""

import ast
import contextlib
import inspect
import io
import itertools
import re
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import tyro

from skipdit.files.untrusted import printable
from skipdit.options import ObjectiveName, check_fields

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class WeightsOptions:
    """Facts about a model that a file of bare weights does not contain."""

    num_attention_heads: int | None = None
    """attention heads per block"""
    num_classes: int | None = None
    """number of classes, without the one that means no class"""
    objective: ObjectiveName | None = None
    """what the model predicts: epsilon, v_prediction, flow (noise - data), sit (as SiT) or repa (as REPA); by default
    epsilon if half of its output is the variance, as in the official DiT"""
    drop: tuple[str, ...] = ()
    """prefixes of keys to leave out, such as the projectors of REPA"""

    def __post_init__(self) -> None:
        check_fields(self)

    def refuse(self, model: str) -> None:
        """Raise `ValueError` naming an option that was given for a model that needs none of them."""
        for option in fields(WeightsOptions):
            if getattr(self, option.name) not in (None, ()):
                raise ValueError(f"{option.name} is only for a file of bare weights, got it for {printable(model)}")


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """What the folder of a pipeline of diffusers may be opened and called with."""

    transformer: str | None = None
    """a checkpoint whose model takes the place of the pipeline's, such as Latte-skip.pt or Tencent's
    pytorch_model_ema.pt; any that skipdit reads"""
    height: int | None = None
    """of pictures or frames, in pixels; by default the pipeline's own"""
    width: int | None = None
    """of pictures or frames, in pixels; by default the pipeline's own"""
    num_frames: int | None = None
    """of clips; by default the pipeline's own"""

    def refuse_for(self, model: str) -> None:
        """Raise `ValueError` naming what has no effect on a model that is no pipeline of diffusers."""
        for option in fields(PipelineOptions):
            if getattr(self, option.name) is not None:
                raise ValueError(f"{option.name} is for a pipeline of diffusers, which {printable(model)} is not")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where the results go."""

    out: Path = Path("out")
    """folder of the results"""
    overwrite: bool = False
    """replace files of the same names that skipdit did not write; a warning names each"""


def parse(
    command: str, text: str | None, arguments: Sequence[str], config: type[Config], default: Config | None = None
) -> Config:
    """Return the options of a command; raises `ValueError`, in one line, if they cannot be parsed.

    text: the beginning of the help. If the config has `GROUPS`, `{group: names of fields}`, the help lists the options
    in these groups; a field that is in none has a box of its own.
    """
    messages = io.StringIO()
    groups = getattr(config, "GROUPS", {})
    try:
        with contextlib.redirect_stderr(messages):
            options: Any = tyro.cli(
                _grouped(config, groups, default) if groups else config,
                default=tyro.MISSING_NONPROP if default is None or groups else default,
                args=list(arguments),
                prog=f"skipdit {command}",
                description=re.sub(r"\n+Example:", "\n\nExample:", inspect.cleandoc(text or "")),
            )
    except SystemExit as exit:
        if exit.code == 0:
            raise
        raise ValueError(_one_line(messages.getvalue())) from exit
    if not groups:
        return options
    boxes = {name: getattr(options, group) for group, names in groups.items() for name in names}
    return config(**{each.name: getattr(boxes.get(each.name, options), each.name) for each in fields(config)})


def config_of(options: object, config: type[Config]) -> Config:
    """Return a config with the values that options have in its fields."""
    return config(**{each.name: getattr(options, each.name) for each in fields(config)})


def explain_fields(config: type) -> dict[str, str]:
    """Return the string under each field of a dataclass and of its bases, by the name of the field; none for a class
    without source."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        try:
            source = inspect.getsource(cls)
        except OSError:
            continue
        (tree,) = ast.parse(textwrap.dedent(source)).body
        for pair in itertools.pairwise(ast.iter_child_nodes(tree)):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def _grouped(config: type, groups: dict[str, tuple[str, ...]], default: Any) -> Any:
    """Return a dataclass with one dataclass of options per group, which the help shows as boxes. default: provides the
    default values instead of the fields."""
    texts, hints = explain_fields(config), get_type_hints(config, include_extras=True)
    by_name = {each.name: each for each in fields(config)}

    def option(name: str) -> tuple[str, Any, Any]:
        value = by_name[name].default if default is None else getattr(default, name)
        kind = Annotated[hints[name], tyro.conf.arg(help=texts[name])]
        return name, kind, field() if value is MISSING else field(default=value)

    boxes: list[tuple[str, Any, Any]] = []
    for group, names in groups.items():
        box = make_dataclass(group, [option(name) for name in names], frozen=True, kw_only=True)
        box.__doc__ = None
        boxes.append((group, tyro.conf.OmitArgPrefixes[box], field()))
    others = [option(name) for name in by_name if name not in set(itertools.chain(*groups.values()))]
    return make_dataclass("Options", [*boxes, *others], frozen=True, kw_only=True)


def _one_line(box: str) -> str:
    """Return the message between the title and the advice in an error box of tyro, without the frame."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    message = itertools.takewhile(lambda line: not line.startswith("For full helptext"), lines)
    return " ".join(line for line in message if line.strip("─-")) or box.strip()
