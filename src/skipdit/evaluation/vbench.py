"""Writes clips for VBench: one `{prompt}-{index}.mp4` per clip, with indices 0 to 4 for the samples of each prompt
(github.com/Vchitect/VBench, "Sampled Videos"; its own sampling scripts write the same names).
"""

from collections import Counter
from pathlib import Path

from skipdit.data.videos import write_mp4
from skipdit.evaluation.items import Items
from skipdit.files.output import atomic_folder
from skipdit.files.untrusted import printable

KIND = "vbench"
MAX_NAME_BYTES = 255 - len("-0000.mp4")
MARKER_LIMIT = 200_000  # clips in one folder


def write_vbench(items: Items, folder: Path, fps: float) -> int:
    """Write every clip of a set under the name of its prompt; return their number. A folder that this function wrote
    before is replaced as a whole. Raises `ValueError` if the set has no clips with texts, or if a text cannot be the
    name of a file."""
    if not items.is_clips or items.texts is None:
        raise ValueError(f"VBench is for clips with their prompts, which {items.source} is not")
    texts = items.texts()
    if len(texts) > MARKER_LIMIT:
        raise ValueError(f"VBench's folder is for at most {MARKER_LIMIT:,} clips, got {len(texts):,}")
    for text in set(texts):
        if "/" in text or "\0" in text or text.startswith(".") or len(text.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"VBench names files by their prompts, which cannot be done with {printable(text)!r}")
    counts: Counter[str] = Counter()
    with atomic_folder(folder, KIND) as draft:
        for index, text in enumerate(texts):
            write_mp4(draft / f"{text}-{counts[text]}.mp4", items.read(index), fps)
            counts[text] += 1
    return len(texts)
