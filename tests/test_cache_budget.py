"""A server that changes the budget with every request."""

import gc
import itertools

import pytest
import torch
from tiny import tiny_pipeline

from skipdit.cache.enable import cached
from skipdit.pipelines import ClassToImagePipeline

NUM_REQUESTS = 200
SPECS = ("auto:1.3", None, "auto:2", "N2", "auto:1.6")


def latents_of(pipeline: ClassToImagePipeline, num_steps: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline([1, 2], num_inference_steps=num_steps, generator=generator, output_type="latent").images


def request(pipeline: ClassToImagePipeline, spec: str | None) -> torch.Tensor:
    if spec is None:
        return latents_of(pipeline)
    with cached(pipeline, spec) as cache:
        made = latents_of(pipeline)
        assert cache.summary().steps_reused > 0
    return made


def num_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def test_200_requests_of_alternating_budgets_make_no_new_graph_and_leave_nothing() -> None:
    torch._dynamo.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    pipeline = tiny_pipeline()
    expected = {spec: request(pipeline, spec) for spec in SPECS}
    pipeline.transformer.compile(fullgraph=True, backend=counting)
    for spec in SPECS:
        request(pipeline, spec)
    num_graphs, before = len(graphs), num_tensors()
    assert num_graphs > 0
    for spec in itertools.islice(itertools.cycle(SPECS), NUM_REQUESTS):
        assert torch.equal(request(pipeline, spec), expected[spec])
    assert len(graphs) == num_graphs
    assert num_tensors() <= before
    assert not pipeline.transformer.is_cache_enabled
    torch._dynamo.reset()


def test_a_budget_with_too_few_full_steps_warns_with_an_alternative() -> None:
    pipeline = tiny_pipeline()  # a reuse step costs a third of a full one
    fault = r"made \d of 30 steps in full, .* steps without a cache are likely better"

    def serve(spec: str) -> None:
        with cached(pipeline, spec):
            for _ in range(2):
                latents_of(pipeline, num_steps=30)

    with pytest.warns(UserWarning, match=fault) as told:
        serve("N15")
    assert len(told) == 1
    serve("N2")
