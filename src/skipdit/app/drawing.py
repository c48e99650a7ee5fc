"""Results as HTML: all text is escaped, and pictures are embedded. Colors are in `page.css`."""

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence

from markdown_it import MarkdownIt
from torch import Tensor

from skipdit.app.generate import Shown, Side, difference
from skipdit.app.jobs import Job
from skipdit.app.quality import MadeSchedule
from skipdit.app.stability import FIGURE, StabilityReport
from skipdit.pictures import to_pictures
from skipdit.terminal import describe

CLIP_MILLISECONDS = 125  # per frame
PIXEL_ART = 160  # side of pictures that are enlarged without blur, in pixels


def escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def picture_uri(sample: Tensor) -> str:
    """Return a picture (c h w) or a clip (f c h w) in [0, 1] as the data URI of a PNG, animated for a clip."""
    frames = to_pictures((sample if sample.ndim == 4 else sample[None]).nan_to_num(1.0))
    stream = io.BytesIO()
    moving = {"save_all": True, "append_images": frames[1:], "duration": CLIP_MILLISECONDS, "loop": 0}
    frames[0].save(stream, "PNG", **(moving if len(frames) > 1 else {}))
    return data_uri(stream.getvalue(), "image/png")


def pictures(
    heading: str, samples: Tensor | None, captions: Sequence[str], detail: str = "", *, across: bool = False
) -> str:
    """Return a panel of samples, or of empty frames if there are none yet. across: draw them in one row."""
    crisp = " crisp" if samples is not None and samples.shape[-1] <= PIXEL_ART else ""
    cells = []
    for place, caption in enumerate(captions):
        inside = '<div class="sd-empty"></div>'
        if samples is not None:
            label = f"{escape(heading)}: {escape(caption)}"
            inside = f'<img class="sd-picture{crisp}" src="{picture_uri(samples[place])}" alt="{label}">'
        cells.append(f'<figure>{inside}<figcaption title="{escape(caption)}">{escape(caption)}</figcaption></figure>')
    columns = 1 if len(captions) == 1 else 2 if len(captions) <= 4 else 3
    columns = min(len(captions), 4) if across else columns
    return (
        f'<section class="sd-panel"><h3>{escape(heading)}<span>{escape(detail)}</span></h3>'
        f'<div class="sd-grid sd-columns-{columns}">{"".join(cells)}</div></section>'
    )


def strip(name: str, is_full: Sequence[bool], num_steps: int) -> str:
    """Return a cell per step: full, reused or still to come."""
    kinds = ["sd-full" if full else "sd-reused" for full in is_full]
    kinds += ["sd-coming"] * (num_steps - len(kinds))
    full, reused = sum(is_full), len(is_full) - sum(is_full)
    label = f"{full} full, {reused} reused" + (f" of {num_steps}" if len(is_full) < num_steps else "")
    cells = "".join(f'<i class="{kind}" title="step {step + 1}"></i>' for step, kind in enumerate(kinds))
    return (
        f'<div class="sd-strip"><b>{escape(name)}</b>'
        f'<div class="sd-steps" role="img" aria-label="{escape(name)}: {label}">{cells}</div><span>{label}</span></div>'
    )


LEGEND = (
    '<p class="sd-legend"><span><i class="sd-full"></i>full step</span>'
    '<span><i class="sd-reused"></i>reused</span><span><i class="sd-coming"></i>to come</span></p>'
)


def cards(figures: Mapping[str, str]) -> str:
    """Return figures side by side, each above its name."""
    inside = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(name)}</dt></div>" for name, value in figures.items())
    return f'<dl class="sd-cards">{inside}</dl>'


def comparison(shown: Shown | None) -> str:
    """Return both runs side by side, with the steps so far."""
    if shown is None:
        return '<div class="sd-hint">Full and cached results appear here, side by side.</div>'
    figures = cards(figures_of(shown)) if shown.is_whole else ""
    sides = "".join(
        pictures(heading, side.samples, shown.captions, detail_of(side))
        for heading, side in (("Full", shown.full), ("Cached", shown.cached))
    )
    strips = "".join(strip(side.name, side.is_full, side.num_steps) for side in (shown.full, shown.cached))
    return (
        f'{figures}<div class="sd-sides">{sides}</div>'
        f'<div class="sd-strips">{strips}{LEGEND}</div>'
        f'<p class="sd-cache">Cache: <code>{escape(shown.cache)}</code></p>'
    )


def detail_of(side: Side) -> str:
    if side.seconds is not None:
        return f"{side.seconds:.1f} s"
    return f"step {len(side.is_full)} of {side.num_steps}" if side.is_full else ""


def figures_of(shown: Shown) -> dict[str, str]:
    figures = {"speedup": f"{shown.speedup:.2f}x", "PSNR, dB": shown.psnr or "…"}
    if shown.ssim:
        figures["SSIM"] = shown.ssim
    if shown.compute_ratio is not None:
        figures["less compute"] = f"{shown.compute_ratio:.2f}x"
    if shown.bytes_held is not None:
        figures["held by the cache"] = size_text(shown.bytes_held)
    return figures


def size_text(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.2f} GiB"


def differences(shown: Shown | None, amplification: float) -> str:
    """Return how far the cached samples are from the full ones; nothing before both are there. shown: `None` of samples
    that are no longer in memory."""
    if shown is None:
        return '<div class="sd-hint">These samples are no longer in memory: generate them again.</div>'
    if (samples := difference(shown, amplification)) is None:
        return ""
    return pictures("Difference", samples, shown.captions, f"x {amplification:g}", across=True)


def schedule(result: MadeSchedule, model: str, url: str) -> str:
    """Return the figures and the steps of a new schedule of a model. url: of its download."""
    figures = {
        "less compute": f"{result.compute_ratio:.2f}x",
        "PSNR predicted, dB": f"{result.predicted_psnr_db:.1f}",
        "PSNR measured, dB": result.measured_psnr,
    }
    return (
        f'{cards(figures)}<div class="sd-strips">{strip("schedule", result.is_full, len(result.is_full))}</div>'
        f"<p>In <b>Generate</b>, <code>{escape(result.name)}</code> is now a cache of {escape(model)}.</p>"
        f'<p><a class="sd-download" href="{escape(url)}" download>Download schedule.json</a></p>'
    )


def report(stability: StabilityReport, url: str = "") -> str:
    """Return a stability report. url: of the download of all its files."""
    page = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link", "autolink"])
    parts = [f'<p class="sd-source">From <code>{escape(stability.where)}</code></p>' if stability.where else ""]
    if url:
        parts.append(f'<p><a class="sd-download" href="{escape(url)}" download>Download the report</a></p>')
    for place, part in enumerate(re.split(FIGURE, stability.markdown)):
        if place % 3 == 0:  # between figures; after it the title and the name of one
            parts.append(page.render(part))
        elif place % 3 == 2 and (figure := stability.figures.get(part)) is not None:
            uri = data_uri(figure.webp, "image/webp")
            parts.append(f'<img class="sd-figure" loading="lazy" src="{uri}" alt="{escape(figure.title)}">')
    body = "".join(parts).replace("<table>", '<div class="sd-scroll"><table>').replace("</table>", "</table></div>")
    return f'<article class="sd-report">{body}</article>'


def status(job: Job, place: int) -> str:
    """Return one line on the progress of a job. place: number of jobs before it."""
    match job.state:
        case "waiting" if place == 0:
            return note("waiting", "Starting …")
        case "waiting":
            before = "1 job is" if place == 1 else f"{place} jobs are"
            return note("waiting", f"Waiting: {before} before this one.")
        case "running":
            return note("running", f"{job.doing or 'starting'}".capitalize() + " …", bar(job.done, job.total))
        case "failed":
            return note("failed", f"{job.message[:1].upper()}{job.message[1:]}")
        case "cancelled":
            return note("cancelled", "Cancelled.")
    return note("done", "Done.")


def bar(done: int, total: int) -> str:
    """Return a progress bar; without a total it only shows that work goes on."""
    if not total:
        return '<progress aria-label="progress"></progress>'
    done = min(done, total)
    return f'<progress aria-label="progress" value="{done}" max="{total}"></progress><span>{done} of {total}</span>'


def note(state: str, text: str, more: str = "") -> str:
    """Return a message that screen readers announce."""
    role = "alert" if state == "failed" else "status"
    return f'<div class="sd-note sd-{state}"><p role="{role}">{escape(text)}</p>{more}</div>'


def failure(error: Exception) -> str:
    return note("failed", describe(error))


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="sd-scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
