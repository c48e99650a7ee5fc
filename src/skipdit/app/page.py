"""The components of the page, and their event handlers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import gradio as gr
from gradio.components import Component

from skipdit.app import chart, drawing
from skipdit.app.downloads import Downloads, Latest
from skipdit.app.generate import BUDGETS, OTHER, SampleRequest, Shown, cache_names, generate
from skipdit.app.jobs import Job, Jobs
from skipdit.app.models import Models, labels_of
from skipdit.app.quality import MadeSchedule, ScheduleRequest, calibrate, find_measurements, with_schedule
from skipdit.app.stability import TASK, Effort, StabilityReport, find_report, make_report
from skipdit.cache.methods import CacheMethod
from skipdit.interfaces import Fields
from skipdit.loading import Source

POLL_SECONDS = 0.25
NUM_KEPT = 4  # comparisons whose samples stay in memory, of all pages together
TITLE = "skipdit"
HEADER = """<header class="sd-header"><h1>skipdit</h1>
<p>Diffusion transformers in full and cached, side by side.</p></header>"""
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

Schedules = dict[str, dict[str, CacheMethod]]  # of this page, by model and name
Changes = dict[Component | gr.Column, object]  # by component, its value or its update
Updates = AsyncIterator[Changes]


def make_theme() -> gr.themes.Base:
    """Return a calm theme that uses the fonts of the reader's machine."""
    return gr.themes.Base(primary_hue="indigo", neutral_hue="slate", radius_size="md", font=FONT, font_mono=MONO).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
    )


def css() -> str:
    return (files("skipdit.app") / "page.css").read_text(encoding="utf-8")


async def follow(jobs: Jobs, job: Job) -> AsyncIterator[None]:
    """Yield at each change of a job until it is over; cancel the job if the iteration ends before."""
    seen = None
    try:
        while True:
            is_over, now = job.is_over, (job.version, jobs.place(job))
            if now != seen:
                seen = now
                yield
            if is_over:
                return
            await asyncio.sleep(POLL_SECONDS)
    finally:
        if not job.is_over:
            jobs.cancel(job.owner, job.kind)


@dataclass
class Part:
    """The components of a tab that belong to its job."""

    run: gr.Button
    cancel: gr.Button
    status: gr.HTML
    results: gr.HTML


@dataclass
class Page:
    """The page."""

    models: Models
    jobs: Jobs
    downloads: Downloads
    folders: Sequence[Path]
    """folders that are searched for reports"""
    parts: dict[str, Part] = field(default_factory=dict)
    comparisons: Latest[Shown] = field(default_factory=lambda: Latest(NUM_KEPT))

    # ------------------------------------------------------------------------------------------------------------------
    # Components

    def build(self) -> gr.Blocks:
        """Return the page, for `gradio.mount_gradio_app`."""
        task = self.models.tasks[0]
        with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
            gr.HTML(HEADER)
            with gr.Row(elem_classes="sd-pick"):
                self.task = gr.Radio(self.models.tasks, value=task, label="Task", scale=3, min_width=260)
                names = self.models.of_task(task)
                self.model = gr.Dropdown(names, value=names[0], label="Model", filterable=False, scale=2, min_width=220)
            # schedules made on this page, the token of the last comparison, the model and the name of the last schedule
            self.own, self.shown, self.made = gr.State({}), gr.State(None), gr.State(None)
            self.is_reported = gr.State(False)
            with gr.Tabs():
                with gr.Tab("Generate"):
                    self.add_generate()
                with gr.Tab("Quality and speed") as quality:
                    self.add_quality()
                with gr.Tab("Stability") as stability:
                    self.add_stability()
            self.connect_choices()
            quality.select(self.show_measurements, self.model, self.chart, **QUIET)
            outputs = [self.found, self.is_reported]
            stability.select(self.show_report, self.is_reported, outputs, **QUIET)
            blocks.load(self.choose_model, [self.model, self.own], self.depends_on_model, **QUIET)
            blocks.unload(self.leave)
        return blocks

    def add_generate(self) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=330, elem_classes="sd-form"):
                self.labels = gr.Dropdown([], multiselect=True, label="Labels", info="one or several, taken in turn")
                self.prompt = gr.Textbox(label="Prompts", info="one per line", lines=3, visible=False)
                self.budget = gr.Radio([*BUDGETS, OTHER], value="2x", label="Cache for a speedup of")
                self.other = gr.Dropdown(
                    [],
                    label="Other cache",
                    info="a speedup such as 1.8, or a name such as N3",
                    allow_custom_value=True,
                    visible=False,
                )
                with gr.Row():
                    self.count = gr.Number(4, label="How many", precision=0, min_width=110)
                    self.seed = gr.Number(0, label="Seed", precision=0, min_width=110)
                with gr.Row():
                    self.steps = gr.Number(50, label="Steps", precision=0, min_width=110)
                    self.guidance = gr.Number(2, label="Guidance", step=0.5, min_width=110)
                part = self.add_part("generate", "Generate")
            with gr.Column(scale=5, min_width=320):
                part.results = gr.HTML(drawing.comparison(None))
                with gr.Column(visible=False, elem_classes="sd-difference") as self.difference_box:
                    self.difference = gr.HTML("")
                    self.amplification = gr.Slider(1, 50, value=20, step=1, label="Amplify the difference", buttons=[])
        form = [self.labels, self.prompt, self.count, self.steps, self.guidance, self.seed, self.budget, self.other]
        outputs = [*vars(part).values(), self.shown, self.difference, self.difference_box]
        part.run.click(self.generate, [self.model, *form, self.own, self.amplification], outputs, **JOB)
        change = [self.shown, self.amplification]
        self.amplification.change(self.amplify, change, self.difference, trigger_mode="always_last", **QUIET)
        self.budget.change(lambda budget: gr.update(visible=budget == OTHER), self.budget, self.other, **QUIET)

    def add_quality(self) -> None:
        self.chart = gr.HTML(min_height=120)
        gr.HTML('<h2 class="sd-title">A schedule for this model</h2><p>Measures what reuse costs at every step, and '
                "finds the steps to keep full for a speedup.</p>")  # fmt: skip
        with gr.Row(elem_classes="sd-form sd-short"):
            self.speedup = gr.Number(2.0, label="Target speedup", step=0.1, min_width=120)
            self.wanted_steps = gr.Number(50, label="Steps", precision=0, min_width=120)
            self.wanted_count = gr.Number(2, label="Samples to measure on", precision=0, min_width=120)
        part = self.add_part("calibrate", "Calibrate")
        part.results = gr.HTML("")
        outputs = [*vars(part).values(), self.own, self.made]
        form = [self.speedup, self.wanted_steps, self.wanted_count]
        made = part.run.click(self.calibrate, [self.model, *form, self.own], outputs, **JOB)
        # asks anew which model is chosen: another one may be, by now
        made.then(self.offer_made, [self.model, self.own, self.made], [self.other, self.budget], **QUIET)

    def add_stability(self) -> None:
        with gr.Row(elem_classes="sd-form sd-short"):
            self.effort = gr.Radio(
                list(get_args(Effort)),
                value="quick",
                label="How carefully",
                info="a minute or two for a small model on a CPU; thorough takes many times as long",
            )
        part = self.add_part("stability", "Measure")
        self.found = part.results = gr.HTML("")
        outputs = [*vars(part).values(), self.is_reported]
        part.run.click(self.measure_stability, [self.model, self.effort], outputs, **JOB)

    def add_part(self, kind: str, name: str) -> Part:
        """Add the buttons and the status of a job."""
        with gr.Row(elem_classes="sd-buttons"):
            run = gr.Button(name, variant="primary", min_width=140, elem_id=f"{kind}-run")
            cancel = gr.Button("Cancel", interactive=False, min_width=100, elem_id=f"{kind}-cancel")
        status = gr.HTML("", elem_classes="sd-status")
        part = self.parts[kind] = Part(run, cancel, status, status)

        def stop(request: gr.Request) -> None:
            self.jobs.cancel(owner_of(request), kind)

        cancel.click(stop, None, None, **QUIET)
        return part

    def connect_choices(self) -> None:
        self.depends_on_model = [self.labels, self.prompt, self.other, self.count, self.steps, self.wanted_steps,
                                 self.guidance, self.chart, self.parts["generate"].status]  # fmt: skip
        self.task.change(self.choose_task, self.task, self.model, **QUIET)
        self.model.change(
            self.choose_model, [self.model, self.own], self.depends_on_model, trigger_mode="always_last", **QUIET
        )

    # ------------------------------------------------------------------------------------------------------------------
    # Choices

    def choose_task(self, task: str) -> Fields:
        names = self.models.of_task(task)
        return gr.update(choices=names, value=names[0])

    def choose_model(self, name: str, own: Schedules) -> Changes:
        """Open a model, and offer its labels, prompts and caches."""
        status = self.parts["generate"].status
        try:
            source = self.models.open(name)
        except (ValueError, OSError) as error:
            return {status: drawing.failure(error)}
        is_prompt, is_video = source.sampler.task.option == "prompt", source.sampler.task.is_video
        labels, caches = labels_of(source), cache_names(source, own.get(name, {}))
        shown = list(source.showcase or labels)[: 1 if is_video else 4]
        steps, scale = source.run_defaults
        return {
            self.labels: gr.update(choices=labels, value=[] if is_prompt else shown, visible=bool(labels)),
            self.prompt: gr.update(value="\n".join(shown) if is_prompt else "", visible=is_prompt),
            self.other: gr.update(choices=caches, value=caches[0]),
            self.count: gr.update(value=1 if is_video else 4),
            self.steps: steps,
            self.wanted_steps: steps,
            self.guidance: gr.update(value=scale, visible=scale is not None),
            self.chart: self.show_measurements(name),
            status: "",
        }

    def offer_made(self, name: str, own: Schedules, made: tuple[str, str] | None) -> Changes:
        """Choose the schedule that has just been made, if its model is still the one that is chosen."""
        if made is None or made[0] != name:
            return {self.other: gr.update()}  # Gradio takes an empty one for a missing output
        names = cache_names(self.models.open(name), own[name])
        return {self.other: gr.update(choices=names, value=made[1]), self.budget: OTHER}

    def amplify(self, token: str | None, amplification: float) -> str:
        """Draw the difference anew; nothing before there is one."""
        return "" if token is None else drawing.differences(self.comparisons.get(token), amplification)

    def show_measurements(self, name: str) -> str:
        try:
            path = self.models.path_of(name)
            return chart.measurements(find_measurements(path, self.folders), name, path)
        except (ValueError, OSError) as error:
            return drawing.failure(error)

    def show_report(self, is_reported: bool) -> Changes:
        """Show an existing report, once; one made on this page stays."""
        if is_reported:
            return {self.is_reported: True}
        try:
            report = find_report(self.folders)
        except (ValueError, OSError) as error:
            return {self.found: drawing.failure(error)}
        hint = f'<div class="sd-hint">No report yet: measure one, or run <code>skipdit analyze</code> ({TASK}).</div>'
        return {self.found: hint if report is None else drawing.report(report), self.is_reported: report is not None}

    def leave(self, request: gr.Request) -> None:
        """Cancel the jobs of a page that was closed."""
        self.jobs.cancel(owner_of(request))

    # ------------------------------------------------------------------------------------------------------------------
    # Jobs

    async def follow_job(
        self,
        kind: str,
        model: str,
        request: gr.Request,
        make: Callable[[Source], Callable[[Job], object]],
        finish: Callable[[Any], Changes],
        watch: Callable[[Job], Changes] = lambda job: {},
    ) -> Updates:
        """Submit a job, and yield what changes on the page until it is over, or only why it is refused.

        make: returns the job's work, given the model. finish: returns what the job's result changes. watch: returns
        what else changes on the way.
        """
        part = self.parts[kind]
        try:
            source = await asyncio.to_thread(self.models.open, model)
            job = self.jobs.submit(owner_of(request), kind, make(source))
        except (ValueError, OSError) as error:
            yield {part.status: drawing.failure(error)}
            return
        yield {part.cancel: gr.update(interactive=True)}
        async for _ in follow(self.jobs, job):
            yield {part.status: drawing.status(job, self.jobs.place(job))} | watch(job)
        closing: Changes = {part.cancel: gr.update(interactive=False)}
        yield closing if job.result is None else closing | finish(job.result)

    async def generate(
        self, model: str, labels: list[str], prompt: str, count: int, steps: int, guidance: float, seed: int,
        budget: str, other: str | None, own: Schedules, amplification: float, request: gr.Request,
    ) -> Updates:  # fmt: skip
        results, drawn = self.parts["generate"].results, None

        def make(source: Source) -> Callable[[Job], object]:
            wanted = SampleRequest(
                labels=tuple(labels or ()),
                prompt=prompt or "",
                num_samples=count,
                num_inference_steps=steps,
                guidance_scale=guidance,
                seed=seed,
                cache=(other or "") if budget == OTHER else budget,
            )
            return lambda job: generate(job, source, wanted, own.get(model, {}))

        def watch(job: Job) -> Changes:
            nonlocal drawn
            if job.shown is drawn:
                return {}
            drawn = job.shown
            return {results: drawing.comparison(drawn), self.difference_box: gr.update(visible=False)}

        def finish(result: Shown) -> Changes:
            return {
                results: drawing.comparison(result),
                self.shown: self.comparisons.keep(result),
                self.difference: drawing.differences(result, amplification),
                self.difference_box: gr.update(visible=True),
            }

        async for changes in self.follow_job("generate", model, request, make, finish, watch):
            yield changes

    async def calibrate(
        self, model: str, speedup: float, steps: int, count: int, own: Schedules, request: gr.Request
    ) -> Updates:
        def make(source: Source) -> Callable[[Job], object]:
            wanted = ScheduleRequest(speedup=speedup, num_inference_steps=steps, num_samples=count)
            return lambda job: calibrate(job, source, wanted)

        def finish(result: MadeSchedule) -> Changes:
            url = self.downloads.add("schedule.json", result.content.encode("utf-8"), "application/json")
            return {
                self.parts["calibrate"].results: drawing.schedule(result, model, url),
                self.own: {**own, model: with_schedule(result, own.get(model, {}))},
                self.made: (model, result.name),
            }

        yield {self.made: None}
        async for changes in self.follow_job("calibrate", model, request, make, finish):
            yield changes

    async def measure_stability(self, model: str, effort: Effort, request: gr.Request) -> Updates:
        def make(source: Source) -> Callable[[Job], object]:
            return lambda job: make_report(job, source, model, effort)

        def finish(result: StabilityReport) -> Changes:
            url = self.downloads.add("stability.zip", result.archive, "application/zip")
            return {self.found: drawing.report(result, url), self.is_reported: True}

        async for changes in self.follow_job("stability", model, request, make, finish):
            yield changes


# Only jobs go through Gradio's queue: its page stops listening between two events, which can lose the second one.
QUIET: Fields = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
JOB: Fields = {**QUIET, "queue": True, "concurrency_limit": None, "trigger_mode": "multiple"}


def owner_of(request: gr.Request) -> str:
    return request.session_hash or ""
