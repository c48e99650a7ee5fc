"""The benchmark of video models: what it counts, what the cache holds, its files. No test looks at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import listing

from skipdit import cli
from skipdit.benchmark import video
from skipdit.benchmark.measure import flops_of, weight_bytes
from skipdit.benchmark.video import VideoRow, bench_size, bench_videos, cached_steps, swap_ratios
from skipdit.benchmark.video_models import (
    CAPTION_CHANNELS,
    CAPTION_TOKENS,
    OUTPUT_CLASSES,
    VideoBenchConfig,
    VideoStep,
    make_plain,
    make_subjects,
)
from skipdit.files.output import OutputFolder

TINY: dict[str, Any] = {
    "presets": ("Latte-S/8",),
    "num_frames": (3,),
    "text_num_heads": 1,
    "text_num_units": 6,
    "text_num_frames": 2,
    "sample_size": 16,
    "num_threads": 1,
    "num_repetitions": 2,
}
TEXT_MODEL = "LatteTransformer3DModel"
LATTE, TEXT = range(2)  # of the sizes


def by_kind(config: VideoBenchConfig, size: int) -> dict[tuple[int, str, int | None], VideoRow]:
    rows = bench_size(config, config.sizes()[size], lambda description: None)
    return {(row.step.num_pairs, row.step.kind, row.step.num_shallow_units): row for row in rows}


@pytest.fixture(scope="module")
def latte() -> dict[tuple[int, str, int | None], VideoRow]:
    torch.manual_seed(0)
    return by_kind(VideoBenchConfig(**TINY, batch_size=2), LATTE)


@pytest.fixture(scope="module")
def text() -> dict[tuple[int, str, int | None], VideoRow]:
    torch.manual_seed(0)
    return by_kind(VideoBenchConfig(**TINY, batch_size=2), TEXT)


def latte_flops(units: int, skips: int, *, batch: int = 2, frames: int = 3, tokens: int = 4, dim: int = 384) -> int:
    """FLOPs of a Latte with patches of 8 that runs so many pairs of blocks and fusions, from its matrices' shapes."""
    rows = batch * frames * tokens
    linear, modulation = rows * 12 * dim**2, batch * 6 * dim**2
    spatial = linear + modulation + 2 * batch * frames * tokens**2 * dim
    temporal = linear + modulation + 2 * batch * tokens * frames**2 * dim
    ends = rows * 8**2 * (4 + 8) * dim + batch * 2 * dim**2
    conditioning = batch * (256 * dim + dim**2)
    return 2 * (units * (spatial + temporal) + skips * rows * 2 * dim**2 + ends + conditioning)


def text_flops(units: int, skips: int, *, batch: int = 2, frames: int = 2, tokens: int = 64, dim: int = 64) -> int:
    """The same of LatteTransformer3DModel with patches of 2; each frame projects the whole text anew."""
    rows, words = batch * frames * tokens, batch * frames * CAPTION_TOKENS
    cross = rows * 2 * dim**2 + words * 2 * dim**2 + 2 * batch * frames * tokens * CAPTION_TOKENS * dim
    spatial = rows * 12 * dim**2 + 2 * batch * frames * tokens**2 * dim + cross
    temporal = rows * 12 * dim**2 + 2 * batch * tokens * frames**2 * dim
    ends = rows * 2**2 * (4 + 8) * dim
    conditioning = batch * (256 * dim + dim**2 + 6 * dim**2)
    conditioning += batch * CAPTION_TOKENS * (CAPTION_CHANNELS * dim + dim**2)
    return 2 * (units * (spatial + temporal) + skips * rows * 2 * dim**2 + ends + conditioning)


@pytest.mark.parametrize(("name", "by_hand"), [("latte", latte_flops), ("text", text_flops)])
def test_flops_equal_a_count_by_hand(name: str, by_hand: Any, request: pytest.FixtureRequest) -> None:
    rows = request.getfixturevalue(name)
    expected = {(0, "plain", None): by_hand(6, 0)}
    if name == "text":
        expected |= {(0, "opened", None): by_hand(6, 0), (0, "plain again", None): by_hand(6, 0)}
    for pairs in (3, 2):
        expected[pairs, "uncached", None] = by_hand(6, pairs)
        for k in (1, 2):
            expected |= {(pairs, "full", k): by_hand(6, pairs), (pairs, "reuse", k): by_hand(2 * k, k)}
    assert {key: row.flops for key, row in rows.items()} == expected

    task = "class-to-video" if name == "latte" else "text-to-video"
    cached = cached_steps(task, {row.step: row for row in rows.values()})
    assert [(each.step.num_pairs, each.step.num_shallow_units) for each in cached] == [(3, 1), (3, 2), (2, 1), (2, 2)]
    for each in cached:
        pairs, k = each.step.num_pairs, each.step.num_shallow_units
        full, reuse = by_hand(6, pairs), by_hand(2 * k, k)
        assert each.ratios["step_bound"] == full / reuse
        for run in each.runs:
            bound = 50 * full / (run.num_full * full + (50 - run.num_full) * reuse)
            assert run.ratios["run_bound"] == pytest.approx(bound)


def test_schedules_are_the_authors() -> None:
    counts = {spec: sum(video.full_steps(spec)) for specs in video.SCHEDULES.values() for spec in specs}
    # N2-900-50: 980 to 900 are 5; of steps 5 to 47, down to 40, every second is full: 21; after 40 nothing is stored: 2
    assert counts == {"N2-900-50": 28, "N3-900-50": 21, "N2-700-50": 33, "N3-700-50": 28}


@pytest.mark.parametrize("size", [LATTE, TEXT])
@torch.no_grad()
def test_what_holding_every_output_takes(size: int) -> None:
    config = VideoBenchConfig(**TINY, dtype="bfloat16")
    held = []

    def hold(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        held.append(output.nbytes)

    plain = make_plain(config, config.sizes()[size])
    for module in plain.model.modules():
        if isinstance(module, OUTPUT_CLASSES):
            module.register_forward_hook(hold)
    sample = plain.call(999)()
    assert sample.isfinite().all()
    assert sample.dtype == torch.bfloat16
    reuse = by_kind(config, size)[3, "reuse", 2]
    assert (len(held), sum(held)) == (reuse.num_outputs, reuse.output_bytes)
    assert reuse.num_outputs == (24, 30)[size]  # of six pairs; a spatial block of diffusers also attends to the text
    tokens, dim = ((3 * 4, 384), (2 * 64, 64))[size]
    assert (reuse.features_held, reuse.bytes_held) == (1, tokens * dim * 2)


@torch.no_grad()
def test_models_share_weights_and_open_units_change_nothing() -> None:
    config = VideoBenchConfig(**TINY)
    subjects = make_subjects(config, config.sizes()[TEXT])
    assert [(step.num_pairs, step.kind) for step, _ in subjects] == [
        (0, "plain"),
        (0, "opened"),
        (0, "plain again"),
        (3, "uncached"),
        (2, "uncached"),
    ]
    plain, opened, again, linked, _ = (subject for _, subject in subjects)
    assert again is plain
    weights = {id(weight) for weight in plain.model.parameters()}
    assert weights <= {id(weight) for weight in linked.model.parameters()}
    assert weight_bytes(plain.model, opened.model) == weight_bytes(plain.model)
    assert all(weight.any() for weight in linked.model.parameters())
    assert type(plain.model) is not type(opened.model)
    assert torch.equal(plain.call(500)(), opened.call(500)())
    assert flops_of(plain.call(500)) == flops_of(opened.call(500))


def test_ratios_hold_within_a_repetition() -> None:
    """A machine that slows down to half its speed in the second repetition and comes back."""

    def row(pairs: int, kind: Any, k: int | None, flops: int, seconds: float) -> VideoRow:
        step, times = VideoStep(TEXT_MODEL, pairs, kind, k), (seconds, 2 * seconds, seconds)
        return VideoRow(step, 4, 1, flops, times, 0, 0, 0, 0, None)

    listed = [
        row(0, "plain", None, 90, 9.0),
        row(0, "opened", None, 90, 9.9),
        row(0, "plain again", None, 90, 9.0),
        row(2, "full", 1, 100, 11.0),
        row(2, "reuse", 1, 25, 4.4),
        row(2, "uncached", None, 100, 10.0),
    ]
    rows = {row.step: row for row in listed}
    (cached,) = cached_steps("text-to-video", rows)
    assert cached.ratios == pytest.approx(
        {"step_ratio": 2.5, "step_bound": 4.0, "overhead": 1.1, "skips_over_plain": 10 / 9}
    )
    n2, n3 = cached.runs
    assert (n2.schedule, n2.num_full, n3.schedule, n3.num_full) == ("N2-700-50", 33, "N3-700-50", 28)
    speedup, bound = 50 * 10 / (33 * 11 + 17 * 4.4), 50 * 100 / (33 * 100 + 17 * 25)
    assert n2.ratios == pytest.approx(
        {"run_speedup": speedup, "run_bound": bound, "achieved": speedup / bound, "over_plain": 0.9 * speedup}
    )
    assert swap_ratios(rows) == {TEXT_MODEL: pytest.approx({"opened": 1.1, "plain_again": 1.0})}
    achieved, overhead, swap = video.verdict([cached], rows)
    assert f"missed by {TEXT_MODEL} 2 pairs full k=1 N2-700-50 (" in achieved
    assert "1.100 to 1.100 times" in overhead
    assert "takes 1.100 times the plain forward, which takes 1.000 times itself" in swap


def cells(text: str) -> list[list[dict[str, str]]]:
    """The tables of a Markdown text, rows by column name."""
    tables = []
    for part in text.split("\n\n"):
        if part.startswith("| "):
            names, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines())
            tables.append([dict(zip(names, line, strict=True)) for line in lines])
    return tables


def test_files_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/skipdit", "bench", "video", "--out", "my folder"])
    config = VideoBenchConfig(**TINY, num_shallow_units=(1,), seed=3)
    rows = bench_videos(config, OutputFolder(tmp_path, "bench"))
    linked = [(pairs, *kind) for pairs in (3, 2) for kind in (("full", 1), ("reuse", 1), ("uncached", None))]
    plain = [(0, "plain", None), (0, "opened", None), (0, "plain again", None)]
    assert [row.step for row in rows] == [
        *(VideoStep("Latte-S/8", *step) for step in (plain[0], *linked)),
        *(VideoStep(TEXT_MODEL, *step) for step in (*plain, *linked)),
    ]
    assert all(len(row.seconds) == 2 and min(row.seconds) > 0 for row in rows)
    assert listing(tmp_path) == ["video_cpu.json", "video_cpu.md"]

    report = json.loads((tmp_path / "video_cpu.json").read_text(encoding="utf-8"))
    read = [{name: entry[name] for name in entry if name != "median_seconds"} for entry in report["rows"]]
    assert [
        VideoRow(**entry | {"step": VideoStep(**entry["step"]), "seconds": tuple(entry["seconds"])}) for entry in read
    ] == rows
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in report["config"].items()}
    assert VideoBenchConfig(**fields) == config

    text = (tmp_path / "video_cpu.md").read_text(encoding="utf-8")
    assert text.startswith("`skipdit bench video --out 'my folder'`\n")
    assert f"torch {torch.__version__}" in text
    assert "- seed: 3\n" in text
    costs, steps, runs, memory = cells(text)
    assert [(line["step"], line["ms"], line["GFLOP"]) for line in costs] == [
        (str(VideoStep(**row["step"])), f"{1e3 * row['median_seconds']:.1f}", f"{row['flops'] / 1e9:.2f}")
        for row in report["rows"]
    ]
    ratios = report["ratios"]
    for line, each in zip(steps, ratios, strict=True):
        assert line["step"] == str(VideoStep(**each["step"]))
        assert all(line[name] == f"{value:.3f}" for name, value in each["ratios"].items())
    told = [(VideoStep(**each["step"]), run) for each in ratios for run in each["runs"]]
    for line, (step, run) in zip(runs, told, strict=True):
        assert (line["step"], line["schedule"]) == (str(step), run["schedule"])
        assert line["full steps"] == str(run["num_full"])
        assert all(line[name] == f"{value:.3f}" for name, value in run["ratios"].items())
    reused = [row for row in report["rows"] if row["step"]["kind"] == "reuse"]
    for line, row in zip(memory, reused, strict=True):
        assert line["held MiB"] == f"{row['bytes_held'] / 2**20:.2f}"
        assert line["all outputs MiB"] == f"{row['output_bytes'] / 2**20:.2f}"
        assert (line["tensors"], line["outputs"]) == (str(row["features_held"]), str(row["num_outputs"]))
    assert f"takes {report['class_swap'][TEXT_MODEL]['opened']:.3f} times the plain forward" in text


def test_a_failed_run_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = OutputFolder(tmp_path, "bench")
    out.write_text("video_cpu.md", "old")
    monkeypatch.setattr(video, "SCHEDULES", {})
    with pytest.raises(KeyError):
        bench_videos(VideoBenchConfig(**TINY, tasks=("class-to-video",), num_shallow_units=(1,)), out)
    assert listing(tmp_path) == ["video_cpu.md"]
    assert (tmp_path / "video_cpu.md").read_text(encoding="utf-8") == "old"


def test_defaults() -> None:
    sizes = [(size.name, size.num_units, size.num_frames) for size in VideoBenchConfig().sizes()]
    assert sizes == [("Latte-S/2", 6, 16), ("Latte-XL/2", 14, 3), (TEXT_MODEL, 28, 4)]
    on_gpu = VideoBenchConfig(device="cuda", tasks=("class-to-video",)).sizes()
    assert [size.num_frames for size in on_gpu] == [16, 16]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_a_missing_gpu_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cuda' needs an NVIDIA GPU"):
        bench_videos(VideoBenchConfig(device="cuda"), OutputFolder(tmp_path, "bench"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tasks", ()),
        ("tasks", ("image-to-video",)),
        ("presets", ("Latte-M/2",)),
        ("presets", ("Latte-S/2", "Latte-S/2")),
        ("num_frames", (4,)),
        ("num_frames", (4, 0)),
        ("text_num_heads", 0),
        ("text_num_units", 0),
        ("text_num_frames", 0),
        ("sample_size", 0),
        ("sample_size", 31),
        ("batch_size", 0),
        ("num_pairs", ()),
        ("num_pairs", (2, 2)),
        ("num_pairs", (None, 3)),  # of Latte-S/2 these are all
        ("num_pairs", (0,)),
        ("num_shallow_units", ()),
        ("num_shallow_units", (1, 1)),
        ("dtype", "float16"),
        ("device", "tpu"),
        ("num_threads", 0),
        ("num_repetitions", 0),
    ],
)
def test_a_bad_value_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as raised:
        VideoBenchConfig(**{field: value})
    assert str(value) in str(raised.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_pairs", (-1,), "num_pairs must be at least 0, got -1"),
        ("num_pairs", (5,), "num_pairs must be at most 3 for 6 units, got 5"),
        ("num_shallow_units", (1, 3), "num_shallow_units must be between 1 and 2 for 6 units .*, got 3"),
        ("num_shallow_units", (0,), "num_shallow_units must be between 1 and 2 for 6 units .*, got 0"),
    ],
)
def test_what_a_model_has_not_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoBenchConfig(**{field: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["video", "--presets", "Latte-M/2"], "got ('Latte-M/2',)"),
        (["video", "--num-pairs", "None", "5"], "num_pairs must be at most 3 for 6 units, got 5"),
        (["video", "--frames", "4"], "--frames"),
        (["video", "--out", "/dev/null/x"], "/dev/null/x"),
        (
            ["pictures"],
            "the benchmark must be one of models, video, conversion, cache, compile, gpu, train, got 'pictures'",
        ),
    ],
)
def test_bad_input_ends_in_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["bench", *options])
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
