"""Every option says what it does, and help comes without PyTorch."""

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import tyro

from skipdit.cli import COMMANDS
from skipdit.command_options import explain_fields, parse
from skipdit.commands.benches import BENCHES
from skipdit.commands.train import GROUPS
from skipdit.options import choose
from skipdit.recipes import RECIPES
from skipdit.sampling.config import SampleConfig
from skipdit.tasks import TASKS
from skipdit.tasks.config import MODEL_CONFIGS
from skipdit.training import TrainConfig

WAYS = [
    *([name] for name in COMMANDS if name not in ("train", "bench")),
    *(["train", name] for name in RECIPES),
    *(["bench", name] for name in BENCHES),
]


def options_of(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The type that tyro is asked for, and what it is made from."""
    asked = []

    def cli(config: Any, *, default: Any, **_: object) -> None:
        asked.append(type(default) if dataclasses.is_dataclass(default) else config)
        raise SystemExit(0)

    monkeypatch.setattr(tyro, "cli", cli)
    with pytest.raises(SystemExit):
        COMMANDS[arguments[0]](arguments[1:])
    (options,) = asked
    return get_args(options)[0] if get_origin(options) is Annotated else options


def find_unexplained(options: Any, path: str = "") -> Iterator[str]:
    """The options of a dataclass, and of those in it, without a text."""
    texts, hints = explain_fields(options), get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint, marks = hints[field.name], []
        while get_origin(hint) is Annotated:
            hint, *found = get_args(hint)
            marks += found
        nested = [each for each in (hint, *get_args(hint)) if dataclasses.is_dataclass(each)]
        for each in nested:
            yield from find_unexplained(each, f"{path}{field.name}.")
        if not nested and not texts.get(field.name) and not any(getattr(mark, "help", None) for mark in marks):
            yield f"{path}{field.name}"


@pytest.mark.parametrize("arguments", WAYS, ids=" ".join)
def test_no_option_without_a_text(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(find_unexplained(options_of(arguments, monkeypatch)))


def test_an_option_without_a_text_is_found() -> None:
    @dataclasses.dataclass
    class Inner:
        """Has one text."""

        told: int = 1
        """a number"""
        bare: int = 1

    @dataclasses.dataclass
    class Options:
        """Has none."""

        inner: Inner
        marked: Annotated[int, tyro.conf.arg(help="a number")]
        bare: int

    assert list(find_unexplained(Options)) == ["inner.bare", "bare"]


@pytest.mark.parametrize(
    "command",
    [
        "sample",
        "train",
        "train emoji",
        "latents",
        "convert",
        "ema",
        "eval",
        "info",
        "analyze",
        "bench",
        "bench cache",
        "bench models",
        "calibrate",
        "app",
    ],
)
def test_help_needs_no_pytorch(command: str) -> None:
    code = (
        "import sys\n"
        "from skipdit.cli import main\n"
        f"try: main([*'{command}'.split(), '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'diffusers', 'numpy', 'gradio'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"usage: skipdit {command}" in printed
    assert printed.splitlines()[-1] == "[]"


def test_training_offers_the_model_of_every_task() -> None:
    assert list(MODEL_CONFIGS) == [task.model_config for task in TASKS.values()]


def test_groups_hold_every_option_and_change_no_value() -> None:
    assert parse("sample", "", [], SampleConfig) == SampleConfig()
    arguments = ["--steps", "7", "--labels", "cat-face", "--overwrite", "--vae", "vae"]
    config = parse("sample", "", arguments, SampleConfig)
    assert (config.num_inference_steps, config.labels, config.overwrite, str(config.vae)) == (
        7, ("cat-face",), True, "vae"
    )  # fmt: skip
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1"):
        parse("sample", "", ["--num-inference-steps", "0"], SampleConfig)


def test_groups_hold_the_options_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(itertools.chain(*GROUPS.values())) == sorted(
        {field.name for field in dataclasses.fields(TrainConfig)}
        - {"data", "model", "objective", "routing", "spectral"}
        | {"out", "resume", "allow_changes", "overwrite", "device", "dry_run"}
    )
    with pytest.raises(SystemExit):
        COMMANDS["train"](["emoji", "--help"])
    printed = capsys.readouterr().out
    assert all(f" {group} options " in printed for group in (*GROUPS, "data", "model", "objective", "routing"))
    assert "--learning-rate FLOAT" in printed
    assert "(default: 0.0008)" in printed  # of the recipe
    assert "--model.num-layers" in printed
    assert "spectral:spectral-config" in printed


def test_choose_names_the_nearest() -> None:
    assert choose("the recipe", "emoji", RECIPES) == "emoji"
    with pytest.raises(ValueError, match="got 'emjoi'; did you mean 'emoji'"):
        choose("the recipe", "emjoi", RECIPES)
    with pytest.raises(ValueError, match=r"got 'xyz'$"):
        choose("the recipe", "xyz", RECIPES)
