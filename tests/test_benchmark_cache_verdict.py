"""The verdict of the benchmark of caches, on rows made by hand."""

import dataclasses
import math

import pytest

from skipdit.benchmark.cache_report import (
    AXES,
    TARGET_DB,
    Group,
    Row,
    best_at,
    front,
    psnr_at,
    standing,
    standings_table,
    verdict,
)
from skipdit.metrics.paired import PairedScore


def row(method: str, group: Group, ratio: float, psnr: float, *, flops: float | None = None, own: float = 0) -> Row:
    return Row(
        method=method,
        setting=f"{ratio}",
        group=group,
        num_steps=50,
        speedups=(ratio - 0.1, ratio, ratio + 0.2),
        flop_ratio=flops,
        scores={
            name: PairedScore(mean=mean, std=1.0, num=8) for name, mean in (("psnr", psnr), ("own_psnr", own)) if mean
        },
    )


ROWS = [
    dataclasses.replace(row("no cache", "control", 1.0, 0.0, flops=1.0), setting="once more"),
    row("a", "ours", 1.0, 50.0, flops=1.5),
    row("a", "ours", 4.0, 30.0, flops=4.0),
    row("b", "ours", 1.9, 60.0, flops=1.9),
    row("c", "others", 1.0, 40.0, flops=2.0),
    row("c", "others", 2.0, 33.0, flops=4.0),
    row("d", "others", 1.5, 32.0),
    row("d", "others", 2.5, 34.5),
    row("l2p", "kin", 1.5, 48.0, flops=1.5),
    row("l2p", "kin", 2.5, 48.0, flops=2.5),
    row("fewer steps", "fewer steps", 1.5, 39.0, flops=1.5),
    row("fewer steps", "fewer steps", 3.0, 31.0, flops=3.0),
    row("second order", "second order", 1.0, 30.0, flops=1.0),
    row("second order", "second order", 4.0, 20.0, flops=4.0, own=30.0),
    row("second order", "second order", 1.6, 29.0, flops=1.6, own=45.0),
    Row(method="e", setting="refused", group="others", num_steps=50, refused="no"),
]


def test_psnr_at_a_ratio() -> None:
    points = [(4.0, 30.0), (1.0, 50.0)]
    assert psnr_at(points, 2) == pytest.approx(40)  # half way between 1 and 4
    assert psnr_at(points, 1) == 50
    assert psnr_at(points, 4) == 30
    assert psnr_at(points, 4.01) is None
    assert psnr_at(points, 0.9) is None
    assert psnr_at([], 2) is None
    assert psnr_at([(1.5, 20.0), (2.5, 25.0)], 2) == 25  # the faster one is better too
    assert psnr_at([*points, (2.0, 10.0)], 2) == 30
    assert front([*points, (2.0, 10.0), (3.0, 30.0)]) == [(1.0, 50.0), (4.0, 30.0)]
    assert best_at({"a": points, "b": [(2.0, 41.0)], "c": [(1.0, 90.0)]}, 2) == ("b", 41.0)
    assert best_at({}, 2) is None


def test_the_verdict_is_at_equal_speedup() -> None:
    times, flops = (standing(ROWS, axis) for axis in AXES)
    assert times.ours == ("a", pytest.approx(40))
    fewer = 39 - 8 * math.log(2 / 1.5) / math.log(3 / 1.5)
    second = 29 - 9 * math.log(2 / 1.6) / math.log(4 / 1.6)
    own = 45 - 15 * math.log(2 / 1.6) / math.log(4 / 1.6)
    assert list(times.gains_db.values()) == pytest.approx([40 - 34.5, 40 - 48, 40 - fewer, 40 - second, 40 - own])
    assert times.rivals["the best other cache"] == ("d", 34.5)
    assert flops.rivals["the best other cache"] == ("c", 40.0)
    first, second, noise = verdict(ROWS)
    assert first.startswith("At 2x in wall-clock time the best of ours is a, 40.00 dB: +5.50 dB over the best other")
    assert "(d, 34.50 dB)" in first
    assert (
        f"Target +{TARGET_DB:g} dB: reached over fewer second-order steps; missed over the best other cache, " in first
    )
    assert second.startswith("At 2x in FLOPs")
    assert "median 1.000, 0.900 to 1.200" in noise


def test_standings_at_every_ratio() -> None:
    standings = [standing(ROWS, "speedup", ratio) for ratio in (1.5, 2.0, 4.0)]
    header, _, *lines = standings_table(standings).splitlines()
    assert header.startswith("| wall-clock time | the best of ours | the best other cache | ")
    assert lines[1].startswith("| 2x | 40.0 (a) | 34.5 (d) | - | 48.0 (l2p) | ")
    assert lines[2].startswith("| 4x | 30.0 (a) | - | - | - | - | 20.0 (second order) | 30.0 (second order) |")


def test_a_verdict_names_the_missing_measurements() -> None:
    ours = [each for each in ROWS if each.group == "ours"]
    (times, _) = verdict(ours)
    assert "the best other cache has no settings on both sides" in times
    assert times.endswith("reached over none; missed over none.")
    (times, _, _) = verdict([each for each in ROWS if each.group != "ours"])
    assert times == "At 2x in wall-clock time none of ours has settings on both sides."
