"""Plugins of serving engines: what they hook is stood in for by modules of the same names; the pipelines are real."""

import sys
from enum import Enum
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline

from skipdit.engines import VARIABLE, sglang, vllm_omni

PLUGINS = {"vllm_omni.general_plugins": vllm_omni, "sglang.multimodal_gen.plugins": sglang}


def install(monkeypatch: pytest.MonkeyPatch, path: str, **contents: Any) -> None:
    """Make a module, and the packages above it, importable for one test."""
    names = path.split(".")
    for end in range(1, len(names) + 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:end]), ModuleType(".".join(names[:end])))
    vars(sys.modules[path]).update(contents)


def latents_of(pipeline: Any) -> torch.Tensor:
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        return pipeline([1, 2], num_inference_steps=12, generator=generator, output_type="latent").images


class Adapter:
    """Loads a pipeline and calls it, as `DiffusersAdapterPipeline` does."""

    def load_weights(self) -> None:
        self._pipeline = tiny_pipeline()

    def forward(self) -> torch.Tensor:
        return latents_of(self._pipeline)


class HookType(Enum):
    AROUND = "around"


class Server:
    """Loads a pipeline and switches a cache on, as `DiffusersPipeline` of SGLang does."""

    def load(self, arguments: Any) -> Any:
        return self._apply_cache_dit(tiny_pipeline(), arguments)

    def _apply_cache_dit(self, pipe: Any, server_args: Any) -> Any:
        return pipe


class HookRegistry:
    @staticmethod
    def register(target: str, hook: Any, hook_type: HookType) -> None:
        assert (target, hook_type) == (sglang.TARGET, HookType.AROUND)
        original = Server._apply_cache_dit
        Server._apply_cache_dit = lambda *arguments: hook(original, *arguments)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, vllm_omni.MODULE, **{vllm_omni.ADAPTER: Adapter})
    install(monkeypatch, sglang.REGISTRY, HookRegistry=HookRegistry, HookType=HookType)
    monkeypatch.setattr(Adapter, "load_weights", Adapter.load_weights)
    monkeypatch.setattr(Server, "_apply_cache_dit", Server._apply_cache_dit)


@pytest.mark.usefixtures("engines")
def test_vllm_omni_serves_its_diffusers_pipelines_with_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "N2")
    for _ in range(2):  # each process may load plugins more than once
        vllm_omni.register()
    adapter = Adapter()
    adapter.load_weights()
    adapter.forward()
    first = adapter.forward()
    assert torch.equal(adapter.forward(), first)
    model = adapter._pipeline.transformer
    summary = model._skipdit_cache.summary()
    assert (summary.method, summary.steps_full, summary.steps_reused, summary.bytes_held) == ("N2-k1", 6, 6, 0)


@pytest.mark.usefixtures("engines")
def test_sglang_serves_its_diffusers_pipelines_with_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "N3")
    sglang.register()
    pipeline = Server().load(SimpleNamespace(cache_dit_config=None))
    latents_of(pipeline)
    summary = pipeline.transformer._skipdit_cache.summary()
    assert (summary.steps_full, summary.steps_reused) == (4, 8)
    with pytest.raises(ValueError, match="SKIPDIT_CACHE=N3 and --cache-dit-config ask for two caches"):
        Server().load(SimpleNamespace(cache_dit_config="cache.yaml"))


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize("value", [None, "", "none"])
def test_without_the_variable_engines_are_unchanged(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(VARIABLE, raising=False) if value is None else monkeypatch.setenv(VARIABLE, value)
    before = Adapter.load_weights, Server._apply_cache_dit
    for plugin in PLUGINS.values():
        plugin.register()
    assert (Adapter.load_weights, Server._apply_cache_dit) == before
    adapter = Adapter()
    adapter.load_weights()
    assert not adapter._pipeline.transformer.is_cache_enabled


@pytest.mark.parametrize("group", PLUGINS)
def test_a_wrong_spec_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch, group: str) -> None:
    monkeypatch.setenv(VARIABLE, "fast:2")
    with pytest.raises(ValueError, match="cache method must be one of"):
        PLUGINS[group].register()


@pytest.mark.parametrize("group", PLUGINS)
def test_engines_find_them(group: str) -> None:
    found = [entry for entry in entry_points(group=group) if entry.name == "skipdit"]
    if not found:
        pytest.skip("skipdit was installed before it had these entry points")
    assert found[0].load() is PLUGINS[group].register
