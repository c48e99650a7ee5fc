"""The benchmark of models: what it counts, its arithmetic and its files. No test looks at a time."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny import listing

from skipdit.benchmark import models
from skipdit.benchmark.measure import Subject, flops_of, run_speedup
from skipdit.benchmark.models import ModelBenchConfig, Row, Step
from skipdit.files.output import OutputFolder
from skipdit.models.dit import PRESETS, DiT
from skipdit.models.long_skip import LongSkipConfig

TINY = {"presets": ("DiT-S/8",), "batch_sizes": (1,), "num_threads": 1, "num_repetitions": 2}
KINDS = (("plain", None), ("full", 1), ("reuse", 1), ("full", 4), ("reuse", 4), ("uncached", None))


def hand_count(
    batch: int, tokens: int, dim: int, patch: int, channels: tuple[int, int], blocks: int, skips: int
) -> int:
    """FLOPs of a DiT that runs `blocks` blocks and `skips` fusions, from the shapes of its matrices."""
    block = tokens * dim * (4 * dim + 8 * dim) + 2 * tokens**2 * dim + dim * 6 * dim
    fusion = tokens * 2 * dim * dim
    ends = tokens * patch**2 * sum(channels) * dim + dim * 2 * dim
    conditioning = 256 * dim + dim * dim
    return 2 * batch * (blocks * block + skips * fusion + ends + conditioning)


def row(kind: str, k: int | None, flops: int, *seconds: float, dtype: str = "float32") -> Row:
    return Row(Step("DiT-XL/2", "eager", dtype, kind, k), 2, flops, seconds, 9.0, 2**20)


@pytest.fixture
def rows() -> dict[Step, Row]:
    """A machine that slows down to half its speed in the second repetition and comes back."""
    listed = [
        row("plain", None, 90, 9.0, 18.0, 9.0),
        row("full", 4, 100, 10.0, 20.0, 10.0),
        row("reuse", 4, 25, 4.0, 8.0, 4.0),
        row("uncached", None, 100, 10.0, 20.0, 10.0),
        row("reuse", 4, 25, 2.0, 4.0, 2.0, dtype="bfloat16"),
    ]
    return {row.step: row for row in listed}


@pytest.mark.parametrize("num_shallow_units", [1, 2])
@torch.no_grad()
def test_flops_agree_with_a_count_by_hand(num_shallow_units: int) -> None:
    sizes = {"num_layers": 6, "num_attention_heads": 2, "attention_head_dim": 24, "patch_size": 2, "sample_size": 16}
    model = DiT(**sizes, long_skip=LongSkipConfig()).eval()
    subject = Subject(model, {"hidden_states": torch.randn(3, 4, 16, 16), "class_labels": torch.tensor([0, 1, 2])})
    counted = {(kind, k): flops_of(call) for kind, k, call in subject.calls([num_shallow_units])}
    plain = dataclasses.replace(subject, model=DiT(**sizes).eval())
    counted |= {(kind, k): flops_of(call) for kind, k, call in plain.calls([num_shallow_units])}

    def by_hand(blocks: int, skips: int) -> int:
        return hand_count(batch=3, tokens=64, dim=48, patch=2, channels=(4, 8), blocks=blocks, skips=skips)

    k = num_shallow_units
    expected = {
        ("plain", None): by_hand(6, 0),
        ("uncached", None): by_hand(6, 3),
        ("full", k): by_hand(6, 3),
        ("reuse", k): by_hand(2 * k, k),
    }
    assert counted == pytest.approx(expected, rel=0.02)


def test_a_cached_run_is_counted_as_the_authors_count() -> None:
    assert len(models.FULL_STEPS) == 50
    assert sum(models.FULL_STEPS) == 26
    assert run_speedup(models.FULL_STEPS, baseline=1.0, full=1.0, reuse=0.0) == pytest.approx(50 / 26)
    assert run_speedup(models.FULL_STEPS, baseline=2.0, full=2.0, reuse=2.0) == 1.0


def test_ratios_hold_within_a_repetition(rows: dict[Step, Row]) -> None:
    full = rows[Step("DiT-XL/2", "eager", "float32", "full", 4)]
    ratios = models.ratios_of(full, rows)
    speedup, bound = 50 * 10 / (26 * 10 + 24 * 4), 50 * 100 / (26 * 100 + 24 * 25)
    assert ratios == pytest.approx(
        {
            "step_ratio": 2.5,
            "step_bound": 4.0,
            "run_speedup": speedup,
            "run_bound": bound,
            "achieved": speedup / bound,
            "over_plain": 0.9 * speedup,
            "overhead": 1.0,
        }
    )


def test_speed_over_float32(rows: dict[Step, Row]) -> None:
    reuse = rows[Step("DiT-XL/2", "eager", "bfloat16", "reuse", 4)]
    assert models.speed_over_float32(reuse, rows) == 2.0
    assert models.speed_over_float32(row("full", 4, 1, 1.0, dtype="bfloat16"), {}) is None


def test_the_verdict_follows_the_numbers(rows: dict[Step, Row]) -> None:
    full = Step("DiT-XL/2", "eager", "float32", "full", 4)
    ratios = {full: models.ratios_of(rows[full], rows)}
    speeds = {step: models.speed_over_float32(row, rows) for step, row in rows.items()}
    achieved, bfloat16, overhead = models.verdict(speeds, ratios)
    assert "reached by none; missed by DiT-XL/2 eager float32 full k=4 (0.899)" in achieved
    assert "reached by DiT-XL/2 eager bfloat16 reuse k=4 (2.000); missed by none" in bfloat16
    assert "1.000 to 1.000 times" in overhead
    ratios[full]["achieved"] = 0.95
    assert "reached by DiT-XL/2 eager float32 full k=4 (0.950); missed by none" in next(models.verdict(speeds, ratios))


@torch.no_grad()
@pytest.mark.parametrize("long_skip", [None, LongSkipConfig()])
def test_no_layer_is_left_at_zero(long_skip: LongSkipConfig | None) -> None:
    subject = models.make_subject(ModelBenchConfig(**TINY), "DiT-S/8", "bfloat16", long_skip)
    assert all(weight.any() for weight in subject.model.parameters())
    assert {weight.dtype for weight in subject.model.parameters()} == {torch.bfloat16}
    sample = subject.call(999)()
    assert sample.isfinite().all()
    assert sample.any()


def test_files_hold_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/skipdit", "bench", "models", "--out", "my folder"])
    config = ModelBenchConfig(**TINY, modes=("eager",), seed=3)
    num_threads = torch.get_num_threads()
    rows = models.bench_models(config, OutputFolder(tmp_path, "bench"))
    assert torch.get_num_threads() == num_threads

    assert [row.step for row in rows] == [
        Step("DiT-S/8", "eager", dtype, kind, k) for dtype in ("float32", "bfloat16") for kind, k in KINDS
    ]
    assert all(len(row.seconds) == 2 and min(row.seconds) > 0 for row in rows)
    assert listing(tmp_path) == ["class_to_image_cpu.json", "class_to_image_cpu.md"]

    report = json.loads((tmp_path / "class_to_image_cpu.json").read_text(encoding="utf-8"))
    read = [{name: entry[name] for name in entry if name != "median_seconds"} for entry in report["rows"]]
    assert [
        Row(**entry | {"step": Step(**entry["step"]), "seconds": tuple(entry["seconds"])}) for entry in read
    ] == rows
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in report["config"].items()}
    assert ModelBenchConfig(**fields) == config
    assert [entry["step"]["num_shallow_units"] for entry in report["ratios"]] == [1, 4, 1, 4]
    for entry in report["ratios"]:
        assert entry["achieved"] == pytest.approx(entry["run_speedup"] / entry["run_bound"])

    text = (tmp_path / "class_to_image_cpu.md").read_text(encoding="utf-8")
    assert text.startswith("`skipdit bench models --out 'my folder'`\n")
    assert f"torch {torch.__version__}" in text
    assert ", 1 threads\n" in text
    assert "- seed: 3\n" in text
    for row in rows:
        assert f"| {row.step} | 1 |" in text


def test_a_failed_run_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = OutputFolder(tmp_path, "bench")
    out.write_text("class_to_image_cpu.md", "old")
    monkeypatch.setattr(models, "FULL_STEPS", ())  # no run of no steps has a speedup
    with pytest.raises(ZeroDivisionError):
        models.bench_models(ModelBenchConfig(**TINY, modes=("eager",), dtypes=("float32",)), out)
    assert listing(tmp_path) == ["class_to_image_cpu.md"]
    assert (tmp_path / "class_to_image_cpu.md").read_text(encoding="utf-8") == "old"


def test_files_of_others_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "class_to_image_cpu.md").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(models, "bench_preset", None)
    with pytest.raises(FileExistsError, match=r"class_to_image_cpu\.md, which an earlier bench did not write"):
        models.bench_models(ModelBenchConfig(**TINY, modes=("eager",)), OutputFolder(tmp_path, "bench"))
    assert listing(tmp_path) == ["class_to_image_cpu.md"]


def test_a_missing_compiler_is_named() -> None:
    import torch._inductor.config as inductor

    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        models.check_compiler("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_a_missing_gpu_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cuda' needs an NVIDIA GPU"):
        models.bench_models(ModelBenchConfig(device="cuda"), OutputFolder(tmp_path, "bench"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presets", ()),
        ("presets", ("DiT-M/2",)),
        ("presets", ("DiT-S/2", "DiT-S/2")),
        ("dtypes", ("float16",)),
        ("modes", ("scripted",)),
        ("device", "tpu"),
        ("num_shallow_units", ()),
        ("num_shallow_units", (0,)),
        ("num_shallow_units", (1, 6)),  # of 12 blocks at most 5
        ("batch_sizes", (4,)),
        ("batch_sizes", (4, 0)),
        ("num_threads", 0),
        ("num_repetitions", 0),
        ("num_warmup", 0),
    ],
)
def test_a_bad_value_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as raised:
        ModelBenchConfig(**{field: value})
    assert str(value) in str(raised.value)


def test_every_preset_has_a_batch_size() -> None:
    for device in ("cpu", "cuda"):
        config = ModelBenchConfig(presets=tuple(PRESETS), device=device)
        assert all(config.batch_size(preset) >= 1 for preset in PRESETS)
    assert ModelBenchConfig().batch_size("DiT-S/2") == 8
    assert ModelBenchConfig(batch_sizes=(1, 3)).batch_size("DiT-XL/2") == 3


@pytest.mark.slow
def test_compiled_steps_are_whole_graphs(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    config = ModelBenchConfig(**TINY, dtypes=("float32",), modes=("compiled", "eager"), num_shallow_units=(1, 4))
    counters.clear()
    rows = models.bench_models(config, OutputFolder(tmp_path, "bench"))
    assert counters["stats"]["unique_graphs"] == len(KINDS) + 1  # one is the check for a compiler
    assert [row.step.mode for row in rows] == ["eager"] * len(KINDS) + ["compiled"] * len(KINDS)
