"""A model of the tests' own, as CONTRIBUTING says that a new one is made: this file, and a row in `OWN_FOLDERS`."""

from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from skipdit.checkpoints.dit import own_options
from skipdit.checkpoints.keys import UnloadedModel, check_options, make_unloaded
from skipdit.checkpoints.wrappings import StateDict
from skipdit.interfaces import Config, Fields
from skipdit.models.forward_plan import PLAIN, ForwardPlan, ForwardState
from skipdit.models.long_skip import BranchInfo, LinkedBlock, LongSkipConfig, LongSkipModel, LongSkipOutput


class MixerBlock(LinkedBlock):
    """One unit: an MLP over the channels of each token, moved by the conditioning."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.long_skip = None

    def forward(self, hidden_states: Tensor, conditioning: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.long_skip is not None:
            hidden_states = self.long_skip(hidden_states, skip)
        return hidden_states + self.mlp(hidden_states + conditioning[:, None])


class Mixer(ModelMixin, LongSkipModel, ConfigMixin):
    """Class-to-image: pixels are tokens, and each unit is a `MixerBlock`."""

    config: Config

    @register_to_config
    def __init__(
        self,
        *,
        sample_size: int = 4,
        patch_size: int = 1,
        in_channels: int = 3,
        out_channels: int = 3,
        num_layers: int = 6,
        width: int = 16,
        num_classes: int = 4,
        long_skip: Fields | None = None,
    ) -> None:
        super().__init__()
        self.embed, self.predict = nn.Linear(in_channels, width), nn.Linear(width, out_channels)
        self.class_embedder, self.time_embedder = nn.Embedding(num_classes + 1, width), nn.Linear(1, width)
        self.blocks = nn.ModuleList(MixerBlock(width) for _ in range(num_layers))
        self.set_long_skips(width, None if long_skip is None else LongSkipConfig.from_dict(long_skip))

    @property
    def null_class_label(self) -> int:
        return self.config.num_classes

    def units(self) -> list[tuple[LinkedBlock, ...]]:
        return [(block,) for block in self.blocks]  # pyright: ignore[reportReturnType]

    def branches(self) -> list[BranchInfo]:
        return [BranchInfo("mlp", unit, "0.mlp", block.get_submodule("mlp")) for unit, block in enumerate(self.blocks)]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        *,
        plan: ForwardPlan = PLAIN,
        stored: Any = None,
        return_dict: bool = True,
    ) -> Any:
        height, width = hidden_states.shape[-2:]
        hidden = self.embed(hidden_states.flatten(2).transpose(1, 2))
        times = timestep.reshape(-1, 1).expand(len(hidden), 1) / 1000
        conditioning = self.class_embedder(class_labels) + self.time_embedder(times.to(hidden.dtype))
        state = ForwardState.begin(self, plan, stored)
        for unit, block in enumerate(self.blocks):
            if unit in plan.idle:
                continue
            (hidden,) = state.enter(unit, hidden)
            if state.runs(unit):
                hidden = block(hidden, conditioning, state.skip(unit))
                state.leave(unit, hidden)
        (hidden,) = state.enter(len(self.blocks), hidden)
        sample = self.predict(hidden).transpose(1, 2).unflatten(2, (height, width))
        return state.finish(LongSkipOutput(sample=sample) if return_dict else (sample,))


def read_folder(config: Fields, tensors: StateDict) -> UnloadedModel:
    """Read what `Mixer.save_pretrained` wrote."""
    options = own_options(config)
    check_options(options, tensors)
    return make_unloaded(lambda: Mixer(**options), tensors)
