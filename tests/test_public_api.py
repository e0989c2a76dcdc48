"""The public names, exactly, and what each says of itself."""

import importlib
import inspect

import pytest

PUBLIC = {
    "lm_softmax.heads": [
        "AdaptiveSoftmax",
        "Agreement",
        "FullSoftmax",
        "HierarchicalSoftmax",
        "LowRankSoftmax",
        "MixtureOfSoftmaxes",
        "NCE",
        "OutputHead",
        "ProductQuantizedSoftmax",
        "SVDPreview",
        "SampledSoftmax",
        "Search",
        "TopK",
        "agreement",
    ],
    "lm_softmax.kernels": [
        "Clusters",
        "Draws",
        "Mixture",
        "Objective",
        "ProductCode",
        "Streamed",
        "Tail",
        "accumulation_dtype",
        "autocast_off",
        "cluster_loss",
        "cluster_nll",
        "code_logits",
        "code_rows",
        "draw_from_clusters",
        "draw_from_logits",
        "draw_from_mixture",
        "draw_from_table",
        "mixture_loss",
        "mixture_nll",
        "product_dtype",
        "streamed_loss",
        "streamed_nll",
        "warm_up",
    ],
    "lm_softmax.encoders": [
        "AdaptiveEmbedding",
        "Cache",
        "Encoder",
        "HuggingFaceEncoder",
        "LSTMEncoder",
        "State",
        "TransformerEncoder",
        "WordEmbedding",
    ],
    "lm_softmax.decoding": [
        "Hypothesis",
        "WithoutWords",
        "beam_search",
        "generate",
        "score",
        "stream",
    ],
    "lm_softmax.callbacks": [
        "MemoryMonitor",
        "PerplexityMonitor",
        "RunSummary",
        "SampleText",
        "StepTimeMonitor",
    ],
}

ALIASES = ("Cache", "State")
names = pytest.mark.parametrize(
    ("module", "name"),
    [
        (module, name)
        for module in PUBLIC
        for name in PUBLIC[module]
        if name not in ("Cache", "State")
    ],
)


@pytest.mark.parametrize("module", PUBLIC)
def test_names_are_exactly_these(module):
    assert sorted(importlib.import_module(module).__all__) == PUBLIC[module]


@names
def test_every_name_says_what_it_is(module, name):
    thing = getattr(importlib.import_module(module), name)
    assert inspect.getdoc(thing), name
    if inspect.isclass(thing) and not issubclass(thing, tuple):
        arguments = set(inspect.signature(thing.__init__).parameters) - {"self", "args", "kwargs"}
        described = inspect.getdoc(thing)
        missing = [argument for argument in arguments if f"{argument}:" not in described]
        assert not missing, f"{name} does not describe {missing}"


@names
def test_public_methods_are_documented(module, name):
    thing = getattr(importlib.import_module(module), name)
    if inspect.isclass(thing):
        own = {key: value for key, value in vars(thing).items() if inspect.isfunction(value)}
        for key, method in own.items():
            assert key.startswith("_") or inspect.getdoc(method), f"{name}.{key}"
