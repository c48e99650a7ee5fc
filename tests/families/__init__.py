"""Every denoising transformer of diffusers at a size that runs in milliseconds."""

from families import audio_and_others, flux, joint_images, kandinsky_sana, single_images, videos, wan
from families.table import Segment, TinyTransformer

__all__ = ["EXPECTED_WARNINGS", "OUT_OF_SCOPE", "TINY", "Segment", "TinyTransformer"]

TINY: dict[str, TinyTransformer] = (
    flux.TABLE
    | joint_images.TABLE
    | single_images.TABLE
    | wan.TABLE
    | videos.TABLE
    | kandinsky_sana.TABLE
    | audio_and_others.TABLE
)

OUT_OF_SCOPE = {
    "DreamLiteTransformer2DModel": "a part of DreamLite's U-Net, which calls it many times a step",
    "MiniMaxMusic3RVQDepthDecoder": "writes tokens one after another, has no timestep",
    "T5FilmDecoder": "its pipeline is gone from diffusers; tuples from block to block, none of the arguments of today",
    "Transformer2DModel": "a part of U-Nets; the denoisers that were once of this class load as DiT and PixArt",
    "TransformerTemporalModel": "a part of U-Nets, which call it many times a step",
}

# what the classes themselves say on a CPU, for `pytest.mark.filterwarnings`
EXPECTED_WARNINGS = (
    "ignore:In CPU autocast:UserWarning",  # Mochi
    "ignore:flex_attention called without torch.compile:UserWarning",  # AnyFlow-FAR, Kandinsky 6 SR
    "ignore:.Transformer2DModelOutput. is deprecated:FutureWarning",  # Stable Audio
)
