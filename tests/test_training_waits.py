"""Nothing in a step of training waits for the device, and batches are the same wherever they come from.

Without a GPU: on a CPU what asks for a number is counted; and a step is made on a device of tensors that have shapes
and no memory, where a tensor of another device or a question is an error.
"""

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from device_waits import DeviceWaits
from diffusers.training_utils import EMAModel
from test_tasks import EVERY_TASK, make_config
from test_tasks import make_data as make_task_data
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from skipdit.data.pictures import ShuffledForever
from skipdit.diffusion import Objective, device_tables
from skipdit.models.long_skip import LongSkipModel
from skipdit.tasks.training import StoredItems
from skipdit.training import TokenRoutingConfig, TrainConfig
from skipdit.training.batches import KIND, batch_loss, find_step_kinds, prepare_batch, step_generator
from skipdit.training.config import OnDevice
from skipdit.training.devices import start_processes
from skipdit.training.learner import unit_gradient_norms
from skipdit.training.loader import DeviceBatches, find_num_workers, load_batches, stays_on_device
from skipdit.training.loop import Run, build_task

CPU, META = torch.device("cpu"), torch.device("meta")
BYPASS = TokenRoutingConfig(mode="bypass", share=0.5, num_shallow_units=1, deep_drop=0.4, dense_end=0.3)
DDPM = Objective(process="ddpm", prediction_type="epsilon")
KINDS = {"routed", "shallow", "dense"}
NUM_STEPS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task_data(tmp_path_factory.mktemp("data"))


def routed(task: str, folder: Path, **options: Any) -> TrainConfig:
    """Ten steps that are of every kind, and draw all that can be drawn."""
    config = make_config(task, folder, max_steps=NUM_STEPS, flip=True, gradient_clip=1.0, routing=BYPASS)
    return dataclasses.replace(config, objective=DDPM, seed=1, **options)


def kinds_of(run: Run, config: TrainConfig) -> list[str]:
    draws = (step_generator(config, KIND, step) for step in range(NUM_STEPS))
    return [run.kinds.at(step, NUM_STEPS, generator) for step, generator in enumerate(draws)]


@pytest.mark.parametrize("task", EVERY_TASK)
@pytest.mark.parametrize("on_device", ["yes", "no"])
def test_a_step_asks_the_device_for_nothing(
    task: str,
    on_device: OnDevice,
    data: Path,
    tmp_path: Path,
) -> None:
    """But which kind of step it is, which is drawn on the CPU on any machine. Norms of units are what a line of the log
    needs."""
    config = routed(task, data, data_on_device=on_device, gradient_guard=3.0, ema_snapshots_every=2)
    run = Run(config, start_processes(CPU), build_task(config), None, tmp_path, resume=False)
    run.begin(allow_changes=False)
    assert set(kinds_of(run, config)) == KINDS
    with load_batches(run.task.data, config, run.accelerator, 0) as batches:
        run.step(batches, 0, 1e-3)
        with DeviceWaits() as kinds:
            kinds_of(run, config)
        with DeviceWaits() as asked:
            for step in range(NUM_STEPS):
                run.step(batches, step, 1e-3, norms_of_units=True)
    assert 0 < kinds.counts.total() <= NUM_STEPS
    assert asked.more_than(kinds) == Counter()


class DrawsOnMeta(torch.Generator):
    """Of which only the device is asked, as nothing is drawn."""

    device = META  # pyright: ignore[reportAssignmentType]


class Copies(TorchDispatchMode):
    """Counts copies from one device to another, by the devices."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.name().startswith(("aten::_to_copy", "aten::copy_")):
            source = args[1] if func.name().startswith("aten::copy_") else args[0]
            if source.device != output.device:
                self.counts[source.device.type, output.device.type] += 1
        return output


@pytest.mark.parametrize("task", EVERY_TASK)
def test_a_step_makes_everything_on_the_device_and_copies_nothing(task: str, data: Path) -> None:
    """Forward, backward and what is done with gradients, on tensors without memory in place of a GPU's. AdamW has no
    fused form for these; the test above has it."""
    config = routed(task, data)
    trainee = build_task(config)
    plans = find_step_kinds(trainee, config).plans
    assert set(plans) == KINDS
    stored, labels = (torch.stack([torch.as_tensor(trainee.data[i][place]) for i in range(6)]) for place in (0, 1))
    pixels, numbers = stored.to(META), labels.to(META)
    trainee.prepare(META)
    device_tables(META)
    model = trainee.model.to(META)
    ema = EMAModel(model.parameters(), foreach=True)
    with Copies() as copies:
        for kind, plan in plans.items():
            share = 0.5 if kind == "routed" else None
            batch = prepare_batch(pixels, numbers, config, trainee, DrawsOnMeta(), META, share)
            loss = batch_loss(trainee, model, config.objective, batch, plan)
            assert {each.device for each in (loss, *vars(batch).values()) if each is not None} == {META}
            model.zero_grad()
            loss.backward()
            norms = unit_gradient_norms(cast(LongSkipModel, model), META)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            ema.step(model.parameters())
            assert {norms.device, norm.device} == {META}
    assert copies.counts == Counter()


def test_on_tensors_without_memory_nothing_is_asked_and_copies_are_counted() -> None:
    with Copies() as copies:
        tensor = torch.ones(3, device=META)
        tensor.copy_(torch.ones(3))
        torch.ones(3).to(META)
        tensor.double()
        for question in (tensor.cpu, tensor.sum().item, lambda: tensor + torch.ones(3)):
            with pytest.raises((RuntimeError, NotImplementedError)):
                question()
    assert copies.counts == {("cpu", "meta"): 2}


# ----------------------------------------------------------------------------------------------------------------------
# Where batches come from


def first_batches(config: TrainConfig, first_step: int, count: int) -> list[tuple[Tensor, Tensor]]:
    with load_batches(build_task(config).data, config, start_processes(CPU), first_step) as batches:
        return list(itertools.islice(batches, count))


@pytest.mark.parametrize("task", ["class-to-image", "class-to-video"])
def test_batches_are_the_same_wherever_they_come_from(task: str, data: Path) -> None:
    """Twelve items, seven a batch: every other batch is of two epochs; and from the middle of a run."""
    config = make_config(task, data, batch_size=7, data_on_device="yes")
    kept = first_batches(config, 0, 12)
    assert kept[0][0].dtype == torch.uint8
    for settings in ({"data_on_device": "no"}, {"data_on_device": "no", "num_workers": 2}):
        for one, other in zip(kept, first_batches(dataclasses.replace(config, **settings), 0, 12), strict=True):
            assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    for one, other in zip(kept[5:], first_batches(config, 5, 7), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    seen = torch.cat([labels.flatten(1)[:, 0] if labels.ndim > 1 else labels for _, labels in kept])[:72]
    assert seen.bincount().tolist() == [24, 24, 24]


@pytest.mark.parametrize("world_size", [2, 5])
def test_processes_share_the_batches_that_stay_on_the_device(world_size: int) -> None:
    stored, labels = torch.arange(12.0)[:, None], torch.arange(12)
    whole = DeviceBatches(stored, labels, ShuffledForever(12, 3, 4), 10)
    parts = [
        DeviceBatches(stored, labels, ShuffledForever(12, 3, 4, rank, world_size), 10 // world_size)
        for rank in range(world_size)
    ]
    for _ in range(8):
        together = torch.stack([next(part)[1] for part in parts], dim=1).flatten()
        assert torch.equal(next(whole)[1], together)


def test_data_that_fits_stays_on_the_device(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("class-to-image", data)
    items = build_task(config).data
    assert isinstance(items, StoredItems)
    num_bytes = 12 * 3 * 8 * 8
    for free, fits in ((4 * num_bytes, True), (4 * num_bytes - 1, False)):
        monkeypatch.setattr("skipdit.training.loader.free_bytes", lambda _, free=free: free)
        assert stays_on_device(config, items, CPU) is fits
        assert stays_on_device(config, items, CPU, 2) is False
        assert stays_on_device(dataclasses.replace(config, num_workers=2), items, CPU) is False
        for say, stays in (("yes", True), ("no", False)):
            asked = dataclasses.replace(config, data_on_device=say, num_workers=2 if say == "yes" else None)
            assert stays_on_device(asked, items, CPU) is stays
    assert find_num_workers(config, CPU, 1) == 0
    assert find_num_workers(dataclasses.replace(config, num_workers=3), torch.device("cuda"), 1) == 3
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert [find_num_workers(config, torch.device("cuda"), count) for count in (1, 4, 16)] == [15, 3, 1]
    with pytest.raises(ValueError, match="data_on_device must be one of auto, yes, no, got 'maybe'"):
        dataclasses.replace(config, data_on_device="maybe")
