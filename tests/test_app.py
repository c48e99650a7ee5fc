"""What is behind the page, without a browser: the line of jobs, forms, caches by name, both runs, reports, refusals."""

import base64
import html
import json
import math
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import tiny_dit

pytest.importorskip("markdown_it", reason='needs the page: pip install "skipdit[app]"')

from skipdit.app import chart, drawing
from skipdit.app.downloads import Downloads
from skipdit.app.generate import (
    SampleRequest,
    Shown,
    Side,
    cache_names,
    difference,
    estimate,
    find_cache,
    generate,
)
from skipdit.app.jobs import MAX_WAITING, Cancelled, Job, Jobs
from skipdit.app.models import Models, labels_of
from skipdit.app.quality import ScheduleRequest, calibrate, find_measurements, with_schedule
from skipdit.app.stability import EFFORTS, find_report, make_report
from skipdit.cache.enable import CachedModel
from skipdit.cache.methods import load_schedule, parse_method
from skipdit.cli import main
from skipdit.diffusion import Objective, add_noise, make_scheduler, prediction_target
from skipdit.loading import BUNDLED, Source, load_source
from skipdit.options.objective import Prediction
from skipdit.pipelines import ClassToImagePipeline

FLOW = Objective(process="flow", prediction_type="flow_prediction")
NAMES = {"0": "ant", "1": "bee", "2": "cat", "3": "dog"}
HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of 16x16 pixels and four named classes."""
    torch.manual_seed(0)
    model = tiny_dit(6, sample_size=16, patch_size=4, in_channels=3, out_channels=3, num_classes=4)
    path = tmp_path_factory.mktemp("model") / "pipeline"
    ClassToImagePipeline(model, make_scheduler(FLOW, "euler"), id2label=NAMES).save_pretrained(path)
    return path


@pytest.fixture
def source(folder: Path) -> Source:
    found = load_source(str(folder))
    found.sampler.pipeline.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    line = Jobs()
    yield line
    line.close()


def job_of(work: Callable[[Job], object] = lambda job: None) -> Job:
    """A job that no line runs."""
    return Job("me", "test", work)


def until(holds: Callable[[], object]) -> None:
    """Wait for another thread."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def ask(**fields: object) -> SampleRequest:
    return SampleRequest(**{"num_samples": 2, "num_inference_steps": 8, "cache": "N2", **fields})  # pyright: ignore[reportArgumentType]


# ----------------------------------------------------------------------------------------------------------------------
# The line


def test_one_job_runs_and_all_others_know_their_place(jobs: Jobs) -> None:
    doors = [threading.Event() for _ in range(3)]
    running: list[int] = []

    def work(place: int) -> Callable[[Job], object]:
        def run(job: Job) -> int:
            running.append(place)
            doors[place].wait(60)
            return place

        return run

    line = [jobs.submit(f"page {place}", "generate", work(place)) for place in range(3)]
    until(lambda: running == [0])
    assert [jobs.place(job) for job in line] == [0, 1, 2]
    assert [job.state for job in line] == ["running", "waiting", "waiting"]
    doors[0].set()
    until(lambda: running == [0, 1])
    assert [jobs.place(job) for job in line[1:]] == [0, 1]
    doors[1].set()
    doors[2].set()
    until(lambda: line[2].is_over)
    assert [job.result for job in line] == [0, 1, 2]


def test_a_page_has_one_job_of_a_kind_and_the_line_an_end(jobs: Jobs) -> None:
    door = threading.Event()
    first = jobs.submit("me", "generate", lambda job: door.wait(60))
    until(lambda: first.state == "running")
    with pytest.raises(ValueError, match="is running one already: cancel it first"):
        jobs.submit("me", "generate", lambda job: None)
    jobs.submit("me", "calibrate", lambda job: None)
    for place in range(MAX_WAITING - 1):
        jobs.submit(f"page {place}", "generate", lambda job: None)
    with pytest.raises(ValueError, match="16 jobs are waiting"):
        jobs.submit("late", "generate", lambda job: None)
    door.set()


def test_a_job_is_cancelled_while_it_waits_and_while_it_runs(jobs: Jobs) -> None:
    def endless(job: Job) -> None:
        while True:
            job.advance()
            time.sleep(0.001)

    first, second = (jobs.submit(owner, "generate", endless) for owner in ("first", "second"))
    until(lambda: first.done > 3)
    jobs.cancel("second")
    assert (first.state, second.state) == ("running", "cancelled")
    jobs.cancel("first", "calibrate")
    assert not first.is_cancelled.is_set()
    jobs.cancel("first", "generate")
    until(lambda: first.is_over)
    assert first.state == "cancelled"


def test_errors_of_a_job_are_one_line_and_a_bug_does_not_stop_the_line(
    jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(error: Exception) -> Callable[[Job], object]:
        def run(job: Job) -> None:
            raise error

        return run

    mistake = jobs.submit("a", "generate", fail(ValueError("no such\nlabel")))
    bug = jobs.submit("b", "generate", fail(KeyError("secret/path")))
    full = jobs.submit("c", "generate", fail(MemoryError()))
    after = jobs.submit("d", "generate", lambda job: "done")
    until(lambda: after.is_over)
    assert (mistake.state, mistake.message) == ("failed", "no such label")
    assert bug.message == "something unexpected went wrong (KeyError); the terminal tells more"
    assert full.message.startswith("out of memory")
    assert after.result == "done"
    assert "a job of the page failed" in caplog.text


# ----------------------------------------------------------------------------------------------------------------------
# What is asked for


@pytest.mark.parametrize("value", [None, "4", True, 10**400, math.nan, math.inf, 0, 17])
def test_a_field_must_hold_a_number_in_its_range(value: object) -> None:
    with pytest.raises(ValueError, match="how many must be "):
        ask(num_samples=value)


def test_fields_have_limits() -> None:
    assert ask(guidance_scale=1.5).guidance_scale == 1.5
    with pytest.raises(ValueError, match="guidance must be from 1 to 30, got 0"):
        ask(guidance_scale=0)
    with pytest.raises(ValueError, match="the target speedup must be from"):
        ScheduleRequest(speedup=1)


def test_prompts_are_lines_and_no_more_than_there_are_samples() -> None:
    assert ask(prompt=" a cat \n\n a dog\n").prompts == ("a cat", "a dog")
    assert ask(labels=("ant", "bee", "cat")).conditions == {"labels": ("ant", "bee"), "prompt": ()}
    with pytest.raises(ValueError, match="at most 1000 characters"):
        ask(prompt="a" * 1001)


def test_a_speedup_or_a_name_finds_a_cache(source: Source) -> None:
    assert find_cache(source, " 1.8x", 12, {})[0] == "auto:1.8"
    assert find_cache(source, "1.8", 12, {})[0] == "auto:1.8"
    own = {"made here": parse_method("N3")}
    assert find_cache(source, "made here", 12, own) == ("made here", own["made here"])
    assert find_cache(source, "skip-taylor:N3-o1", 12, {})[0] == "skip-taylor:N3-o1"
    assert "N2" in cache_names(source)
    assert cache_names(source, own)[0] == "made here"


def test_a_calibrated_schedule_is_taken_where_it_suits_the_run() -> None:
    emoji = load_source("emoji")
    assert find_cache(emoji, "2x", 50, {})[0] == "calibrated:output-2x"
    assert find_cache(emoji, "1.8x", 50, {})[0] == "calibrated:1.8x"
    assert find_cache(emoji, "2x", 30, {})[0] == "auto:2"
    assert find_cache(emoji, "2.2x", 50, {})[0] == "auto:2.2"
    assert find_cache(emoji, "calibrated:3x", 30, {})[0] == "calibrated:3x"
    assert cache_names(emoji)[0] == "calibrated:1.3x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "choose a cache"),
        ("none", "choose a cache"),
        ("0.9x", "a speedup must be above 1"),
        ("999x", "speedup"),
        ("N9x", "a cache spec is"),
        ("nonsense:N2", "cache method must be one of"),
        ("N1", "would never reuse"),
        ("calibrated:2x", "calibrated schedules"),
        ("N2" * 60, "at most 100 characters"),
    ],
)
def test_what_is_no_cache_is_refused_with_a_reason(text: str, message: str, source: Source) -> None:
    with pytest.raises(ValueError, match=message):
        find_cache(source, text, 12, {})


def test_no_cache_is_read_from_a_file(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    path.write_text('{"full_steps": [0, 2], "num_inference_steps": 4}')
    assert load_schedule(path)
    for text in (str(path), "schedule.json", "../x", "calibrated:../x.json"):
        with pytest.raises(ValueError, match=r"not a file, got|calibrated schedules"):
            find_cache(source, text[-90:], 4, {})


def test_models_are_those_that_were_named(folder: Path) -> None:
    models = Models([str(folder), str(folder)])
    name = folder.parent.name
    assert models.of_task("class-to-image") == [name, f"{name} (2)", "emoji"]
    assert models.tasks == ["class-to-image", "class-to-video", "text-to-image", "text-to-video"]
    assert labels_of(models.open(name)) == ["ant", "bee", "cat", "dog"]
    assert models.path_of(name) == str(folder)
    for other in (str(folder), "/etc", "nowhere"):
        with pytest.raises(ValueError, match="model must be one of"):
            models.open(other)
    models.open("emoji")
    models.open("emoji-clips")
    assert list(models.kept) == ["emoji", "emoji-clips"]


def test_models_that_were_named_have_the_dtype_asked_for(folder: Path) -> None:
    models = Models([str(folder)], dtype="bfloat16")
    models.open("emoji-clips")
    dtypes = {name: models.open(name).sampler.pipeline.transformer.dtype for name in ("emoji", folder.parent.name)}
    assert dtypes == {"emoji": torch.float32, folder.parent.name: torch.bfloat16}


# ----------------------------------------------------------------------------------------------------------------------
# Both runs


def test_both_runs_are_told_step_by_step(source: Source) -> None:
    seen: list[tuple[str, int, Shown]] = []

    class Watched(Job):
        def tell(self, **fields: object) -> None:
            super().tell(**fields)
            seen.append((self.doing, self.done, self.shown))

    made = generate(Watched("me", "test", lambda job: None), source, ask(labels=["cat"], cache="N3"), {})
    steps = [(doing, done) for doing, done, _ in seen]
    assert steps[0] == ("warming up", 0)
    assert ("sampling in full", 8) in steps
    assert ("sampling cached", 3) in steps
    third = next(shown for doing, done, shown in seen if (doing, done) == ("sampling cached", 3))
    assert third.cached.is_full == (True, False, False)
    assert third.cached.samples is not None
    assert third.cached.samples.shape == (2, 3, 16, 16)
    assert third.full.seconds is not None
    assert not third.is_whole
    assert made.full.is_full == (True,) * 8
    assert made.cached.is_full == (True, False, False) * 2 + (True, False)
    assert made.captions == ["cat", "cat"]
    assert made.speedup is not None
    assert made.compute_ratio is not None
    assert made.compute_ratio > 1
    assert made.bytes_held
    assert " ± " in made.psnr
    page = drawing.comparison(made)
    assert page.count("data:image/png;base64,") == 4
    assert "3 full, 5 reused" in page
    assert "8 full, 0 reused" in page


def test_a_run_that_is_cancelled_leaves_the_model_as_it_was(source: Source) -> None:
    pipeline, job = source.sampler.pipeline, job_of()
    whole_run = generate(job_of(), source, ask(), {})

    class Stopped(Job):
        def tell(self, **fields: object) -> None:
            if self.doing == "sampling cached" and fields.get("done") == 3:
                assert isinstance(pipeline.transformer, CachedModel)
                self.is_cancelled.set()
            super().tell(**fields)

    job = Stopped("me", "test", lambda job: None)
    with pytest.raises(Cancelled):
        generate(job, source, ask(), {})
    assert not isinstance(pipeline.transformer, CachedModel)
    assert "step" not in vars(pipeline.scheduler)
    again = generate(job_of(), source, ask(), {})
    assert whole_run.cached.samples is not None
    assert again.cached.samples is not None
    assert torch.equal(again.cached.samples, whole_run.cached.samples)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction", "sample"])
def test_pictures_on_the_way_are_what_the_model_sees(prediction: Prediction) -> None:
    process = "flow" if prediction in ("flow_prediction", "sample") else "ddpm"
    objective = Objective(process=process, prediction_type=prediction)
    pictures, noise, timesteps = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([400, 700])
    noisy = add_noise(objective, pictures, noise, timesteps)
    target = prediction_target(objective, pictures, noise, timesteps)
    torch.testing.assert_close(estimate(objective, target, noisy, timesteps), pictures, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"labels": ["cta"]}, "unknown label 'cta'"), ({"prompt": "a cat"}, "takes --labels"), ({"cache": "N1"}, "never")],
)
def test_what_cannot_be_sampled_is_refused(fields: dict[str, object], message: str, source: Source) -> None:
    with pytest.raises(ValueError, match=message):
        generate(job_of(), source, ask(**fields), {})


def test_the_difference_is_amplified_and_shows_what_is_broken() -> None:
    full = torch.full((1, 3, 2, 2), 0.5)
    cached = full + torch.tensor([0.01, -0.01, math.nan, 0.5]).view(2, 2)
    shown = Shown(Side("full", 4, samples=full, seconds=1), Side("cached", 4, samples=cached), ["cat"], "N2")
    assert difference(shown, 10) is None
    shown = Shown(shown.full, Side("cached", 4, samples=cached, seconds=1), ["cat"], "N2")
    found = difference(shown, 10)
    assert found is not None
    torch.testing.assert_close(found[0, 0], torch.tensor([[0.1, 0.1], [1.0, 1.0]]))
    assert "x 10" in drawing.differences(shown, 10)
    assert "no longer in memory" in drawing.differences(None, 10)


def test_texts_are_escaped_and_clips_move() -> None:
    clips = torch.rand(1, 4, 3, 8, 8)
    shown = Shown(Side("full", 4, samples=clips), Side("cached", 4), [HOSTILE], HOSTILE)
    page = drawing.comparison(shown) + drawing.note("failed", HOSTILE)
    assert HOSTILE not in page
    assert "&lt;img src=x" in page
    uri = page.split('src="data:image/png;base64,')[1].partition('"')[0]
    assert Image.open(BytesIO(base64.b64decode(uri))).n_frames == 4  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("state", "place", "text"),
    [
        ("waiting", 2, "Waiting: 2 jobs are before this one."),
        ("waiting", 1, "Waiting: 1 job is before this one."),
        ("waiting", 0, "Starting …"),
        ("cancelled", 0, "Cancelled."),
        ("failed", 0, "No such label"),
    ],
)
def test_a_job_says_where_it_is(state: str, place: int, text: str) -> None:
    job = job_of()
    vars(job).update(state=state, message="no such label")
    assert text in drawing.status(job, place)


# ----------------------------------------------------------------------------------------------------------------------
# Quality and speed, stability


def row(
    setting: str, speedup: float | None, psnr: float, group: str = "ours", method: str = "auto"
) -> dict[str, object]:
    return {"method": method, "setting": setting, "group": group, "speedup": speedup, "psnr": {"mean": psnr, "std": 1}}


def test_measurements_of_a_model_are_drawn(tmp_path: Path) -> None:
    rows = [
        *(row("auto:1.5", 1.5, 60.0), row("auto:2", 2.0, 50.0), row("slow", 1.4, 40.0), row(HOSTILE, 2.5, 45.0)),
        *(row("25 steps", 2.0, 31.0, "fewer steps", "fewer steps"), row("N2", 1.8, 38.0, "others", "skip")),
        *(row("refused", None, 1.0), row("once more", 1.0, 99.0, "control", "no cache")),
    ]
    (tmp_path / "cache_quality.json").write_text(json.dumps({"rows": rows, "environment": {"cpu": "x"}}))
    found = find_measurements("emoji", [tmp_path / "none", tmp_path])
    assert found is not None
    assert [series.method for series in found.series] == ["auto", "fewer steps", "skip"]
    assert [point.setting for point in found.series[0].points] == ["auto:1.5", "auto:2", HOSTILE]
    page = chart.measurements(found, "emoji", "emoji")
    assert page.count("<polyline") == 2 * 3
    assert page.count('sd-series sd-baseline"') == 2
    assert "auto:1.5: 1.50x, 60.0 dB" in page
    assert HOSTILE not in page
    assert find_measurements("emoji-clips", [tmp_path]) is None
    page = html.unescape(chart.measurements(None, "my run", "runs/my run/pipeline"))
    assert "skipdit bench cache --model 'runs/my run/pipeline' --out out" in page
    assert "Nothing has been measured of my run yet." in page
    (tmp_path / "cache_quality.json").write_text('{"rows": [{"speedup": "fast"}]}')
    with pytest.raises(ValueError, match="is not as expected"):
        find_measurements("emoji", [tmp_path])


def test_the_measurements_of_the_repository_are_drawn(repo_root: Path) -> None:
    found = find_measurements("emoji", [repo_root / "benchmarks"])
    assert found is not None
    assert {"auto", "calibrated", "fewer steps"} <= {series.method for series in found.series}
    assert "PSNR over speedup" in chart.measurements(found, "emoji", "emoji")


def test_a_schedule_is_made_and_can_be_used_and_downloaded(source: Source, tmp_path: Path) -> None:
    job = job_of()
    made = calibrate(job, source, ScheduleRequest(speedup=1.3, num_inference_steps=6, num_samples=1))
    assert job.done == 0
    assert made.compute_ratio >= 1.3
    assert made.is_full[0]
    assert not all(made.is_full)
    path = tmp_path / "1.3x.json"
    path.write_text(made.content)
    assert load_schedule(path).schedule == made.method.schedule
    used = generate(job_of(), source, ask(cache=made.name, num_inference_steps=6), {made.name: made.method})
    assert used.cached.is_full == made.is_full
    older = dict.fromkeys(("other", made.name), parse_method("N2"))
    assert with_schedule(made, older) == {made.name: made.method, "other": older["other"]}
    assert "Download schedule.json" in drawing.schedule(made, "emoji", "/download/x/schedule.json")
    with pytest.raises(ValueError, match="no target is within reach"):
        calibrate(job_of(), source, ScheduleRequest(speedup=9, num_inference_steps=6, num_samples=1))


@pytest.mark.parametrize("work", ["calibrate", "stability"])
def test_calibration_and_analysis_can_be_cancelled(work: str, source: Source) -> None:
    class Stopped(Job):
        def check(self) -> None:
            if self.done == 4:
                self.is_cancelled.set()
            super().check()

    job = Stopped("me", work, lambda job: None)
    works = {
        "calibrate": lambda: calibrate(job, source, ScheduleRequest(speedup=1.3, num_inference_steps=8, num_samples=1)),
        "stability": lambda: make_report(job, source, "tiny", "quick"),
    }
    with pytest.raises(Cancelled):
        works[work]()
    assert job.done == 4
    assert not source.sampler.pipeline.transformer._forward_pre_hooks
    assert not isinstance(source.sampler.pipeline.transformer, CachedModel)


def test_a_stability_report_is_made_and_found_again(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"num_pictures": 1, "num_inference_steps": 4, "jacobian_timesteps": 1, "methods": ("N2",)}
    monkeypatch.setitem(EFFORTS, "quick", type(EFFORTS["quick"])(**{**vars(EFFORTS["quick"]), **small}))
    report = make_report(job_of(), source, "tiny", "quick")
    with zipfile.ZipFile(BytesIO(report.archive)) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "stability")
    assert {"report.md", "report.html", "report.json", "arrays.npz"} < set(names)
    page = drawing.report(report, "/download/x/stability.zip")
    assert page.count("data:image/webp;base64,") == sum(name.endswith(".png") for name in names) > 4
    assert "Download the report" in page
    assert "<table>" in page
    found = find_report([tmp_path / "none", tmp_path])
    assert found is not None
    assert found.markdown == report.markdown
    assert f"From <code>{tmp_path}/stability</code>" in drawing.report(found)
    (tmp_path / "stability" / "report.md").write_text(f"{HOSTILE}\n\n![x](../secret.png)\n\n[a](javascript:alert)\n")
    page = drawing.report(find_report([tmp_path]) or report)
    assert "<img" not in page
    assert "href" not in page


def test_stability_is_of_pictures_of_classes() -> None:
    with pytest.raises(ValueError, match="stability is measured of class-to-image models, emoji-clips is a"):
        make_report(job_of(), load_source("emoji-clips"), "emoji-clips", "quick")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_downloads_are_found_by_their_names_alone() -> None:
    downloads = Downloads()
    url = downloads.add("schedule.json", b"{}", "application/json")
    _, _, token, name = url.split("/")
    assert name == "schedule.json"
    found = downloads.get(token)
    assert found is not None
    assert found.content == b"{}"
    assert downloads.get("other") is None
    for _ in range(20):
        downloads.add("schedule.json", b"{}", "application/json")
    assert downloads.get(token) is None


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:80", None, None),
        ("localhost:80", "http://localhost:80", None),
        ("[::1]:80", "http://[::1]:80", None),
        ("localhost:80", "http://localhost:81", 403),
        ("localhost:80", "null", 403),
        ("example.com", "http://example.com", 403),
        ("[::1", None, 400),
        ("localhost:80", "http://[", 400),
    ],
)
def test_other_sites_and_broken_addresses_are_refused(host: str, origin: str | None, status: int | None) -> None:
    pytest.importorskip("uvicorn", reason='needs the page: pip install "skipdit[app]"')
    from skipdit.app.server import refusal

    assert refusal("POST", "/gradio_api/queue/join", host, origin, loopback=True) == status


FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/run/predict"])
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"data": ["emoji", ["ant", "bee"], None, 2, 1.5], "event_data": {"index": 1}, "fn_index": 1}, 200),
        ({"session_hash": "a", "fn_index": 1, "event_id": "b"}, 200),
        ({"data": [FILE]}, 400),
        ({"data": ["emoji", [["ant", [FILE]]]]}, 400),
        ({"data": "x" * 2**20}, 400),
        ([FILE], 400),
        ("{", 400),
    ],
)
def test_a_page_sends_no_files(path: str, body: object, status: int) -> None:
    """Gradio would copy a file of the machine, or of another one, into its folder."""
    pytest.importorskip("uvicorn", reason='needs the page: pip install "skipdit[app]"')
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route
    from starlette.testclient import TestClient

    from skipdit.app.server import Guard

    async def echo(request: Request) -> Response:
        return Response(await request.body())

    app = Guard(Starlette(routes=[Route(path, echo, methods=["POST"])]), loopback=True)
    sent = body if isinstance(body, str) else json.dumps(body)
    answer = TestClient(app, base_url="http://localhost").post(path, content=sent)
    assert answer.status_code == status
    assert answer.text == (sent if status == 200 else "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "port must be at most 65535"),
        (["--models", "nowhere"], "no model at nowhere"),
        (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
    ],
)
def test_the_command_refuses_what_cannot_be(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio", reason='needs the page: pip install "skipdit[app]"')
    with pytest.raises(SystemExit) as error:
        main(["app", "--port", "0", *options] if "--port" not in options else ["app", *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["app"])
    assert 'the page needs gradio and markdown_it: pip install "skipdit[app]"' in capsys.readouterr().err


def test_bundled_models_are_offered() -> None:
    assert list(Models().offers) == list(BUNDLED)
