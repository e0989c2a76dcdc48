"""Use the heads from the installed wheel, outside of the checkout, with torch alone."""

import sys

import torch

from lm_softmax import heads

assert "site-packages" in heads.__file__, heads.__file__
for name in (
    "FullSoftmax",
    "AdaptiveSoftmax",
    "HierarchicalSoftmax",
    "LowRankSoftmax",
    "MixtureOfSoftmaxes",
    "ProductQuantizedSoftmax",
    "SampledSoftmax",
    "NCE",
):
    options = {"cutoffs": [100, 1000]} if name == "AdaptiveSoftmax" else {}
    head = getattr(heads, name)(32, 5000, **options)
    hidden, target = torch.randn(4, 7, 32), torch.randint(5000, (4, 7))
    loss = head(hidden, target)
    loss.backward()
    log_prob = head.log_prob(hidden, target).mean()
    assert torch.allclose(loss, -log_prob) or not head.loss_is_nll
    assert head.topk(hidden, 3).indices.shape == (4, 7, 3)
    assert head.sample(hidden).shape == (4, 7, 1)
foreign = {"lightning", "datasets", "tokenizers", "torchmetrics", "jsonargparse"} & set(sys.modules)
assert not foreign, foreign
print(f"heads work from {heads.__file__}")  # noqa: T201
