"""Our class-to-image DiT as diffusers' `DiTTransformer2DModel`, with the same weights and long skips: caches of other
libraries look for the attentions and blocks of diffusers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from diffusers import CacheMixin, DiTTransformer2DModel
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import Tensor, nn

from skipdit.checkpoints.dit import to_diffusers
from skipdit.models.dit import DiT
from skipdit.models.long_skip import LongSkipConfig, LongSkipOutput
from skipdit.models.surgery import add_long_skips, remove_long_skips
from skipdit.pipelines import ClassToImagePipeline


@dataclass
class HookedRun:
    """Of the current or the last run. timestep: of the current call, 0 to 1000. calls, computed: of the model, and of
    the query projection in its middle block."""

    timestep: float = -1.0
    calls: int = 0
    computed: int = 0


class HookedDiT(CacheMixin, DiTTransformer2DModel):
    """diffusers' DiT as `ClassToImagePipeline` calls a model, with what hooks ask for.

    starts: called when a run begins. null_class_first: the halves of a guided batch change places on the way in and
    out. stand_in: the first block's norm, where another module stands for all blocks (in a tuple: no submodule).
    """

    run: HookedRun
    starts: Callable[[], None] | None = None
    null_class_first: bool = False
    stand_in: tuple[nn.Module, ...] = ()

    @property
    def null_class_label(self) -> int:
        return cast(Any, self.config).num_classes

    def __call__(self, hidden_states: Tensor, timestep: Tensor, *, class_labels: Tensor) -> LongSkipOutput:
        """As `DiT.__call__`; the timestep is one for the batch."""
        value = float(timestep)
        if value >= self.run.timestep:
            self.run.calls = self.run.computed = 0
            self._reset_stateful_cache()
            if self.starts is not None:
                self.starts()
        self.run.timestep = value
        self.run.calls += 1
        swap = self.null_class_first
        if swap and not bool((class_labels == self.null_class_label).any()):
            raise ValueError("this cache estimates the null class: it needs a guidance_scale above 1")
        arguments = {
            "hidden_states": _swap_halves(hidden_states) if swap else hidden_states,
            "timestep": timestep.reshape(1).expand(hidden_states.shape[0]),
            "class_labels": _swap_halves(class_labels) if swap else class_labels,
        }
        with CacheMixin.cache_context(self, "guided"):  # both branches are in the batch
            (sample,) = super().__call__(**arguments, return_dict=False)
        return LongSkipOutput(sample=_swap_halves(sample) if swap else sample)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.stand_in:
            cast(Any, self.transformer_blocks[0]).norm1 = self.stand_in[0]
        return super().forward(*args, **kwargs)


def _swap_halves(batch: Tensor) -> Tensor:
    return batch.roll(batch.shape[0] // 2, dims=0)


def as_diffusers(pipeline: ClassToImagePipeline) -> ClassToImagePipeline:
    """The same pipeline, with its own copy of the weights, around a `HookedDiT`; samples are equal but for rounding.

    `ValueError` where the transformer is not our DiT, or diffusers' has no place for one of its options.
    """
    model = pipeline.transformer
    if not isinstance(model, DiT):
        raise ValueError(f"rivals run on our class-to-image DiT, got {type(model).__name__}")
    plain = copy.deepcopy(model)
    if model.long_skip_links.sources:
        remove_long_skips(plain)
    hooked: Any = to_diffusers(plain)
    hooked.__class__ = HookedDiT
    if model.long_skip_links.sources:
        add_long_skips(hooked, LongSkipConfig.from_dict(model.config.long_skip))
        for block, ours in zip(hooked.transformer_blocks, model.blocks, strict=True):
            if block.long_skip is not None:
                block.long_skip.load_state_dict(cast(Any, ours).long_skip.state_dict())
    hooked.register_to_config(num_classes=model.config.num_classes)
    hooked.run = run = HookedRun()

    def count(*_: Any) -> None:
        run.computed += 1

    blocks = hooked.transformer_blocks
    blocks[len(blocks) // 2].attn1.to_q.register_forward_hook(count)
    # first-block and magnitude caches read the signature of a block's class, which `UnitBlock` hides
    for block_class in {type(block) for block in blocks}:
        TransformerBlockRegistry.register(
            block_class,
            TransformerBlockMetadata(return_hidden_states_index=0, _cached_parameter_indices={"hidden_states": 0}),
        )
    rebuilt = ClassToImagePipeline(
        hooked.to(model.device), copy.deepcopy(pipeline.scheduler), pipeline.vae, pipeline.config.id2label
    )
    rebuilt.set_progress_bar_config(disable=True)
    return rebuilt
