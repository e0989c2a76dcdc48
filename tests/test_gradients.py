"""Sparse gradients: clipping against torch's on dense ones, and what is refused before a step."""

import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from lm_softmax import gradients
from lm_softmax.encoders import AdaptiveEmbedding, LSTMEncoder, TransformerEncoder, WordEmbedding
from lm_softmax.heads import FullSoftmax

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
ON_DENSE = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}


def rows(indices, shape, dtype=torch.float64):
    """A sparse gradient; an index that occurs twice stands for the sum."""
    values = torch.randn(len(indices), *shape[1:], dtype=torch.float64)
    return torch.sparse_coo_tensor(
        torch.tensor([indices], dtype=torch.int64), values.to(dtype), shape, check_invariants=True
    )


def holding(*grads):
    parameters = []
    for grad in grads:
        parameters.append(nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype)))
        parameters[-1].grad = grad
    return parameters


def dense(parameters):
    return holding(*[p.grad.to_dense().clone() for p in parameters])


def assert_same(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        assert_close(one.grad.to_dense(), other.grad, equal_nan=True, **tolerance)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clips_as_torch_does_dense_gradients(algorithm, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    grads = []
    for _ in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.sampled_from([(6,), (6, 3), (6, 2, 2)]))
        if data.draw(st.booleans()):
            grad = rows(data.draw(st.lists(st.integers(0, 5), max_size=8)), shape)
            grads.append(grad.coalesce() if data.draw(st.booleans()) else grad)
        else:
            grads.append(torch.randn(shape, dtype=torch.float64))
    parameters = holding(*grads)
    expected = dense(parameters)
    limit = data.draw(st.sampled_from([1e-3, 0.5, 2.0, 100.0]))
    gradients.clip_gradients(parameters, limit, algorithm)
    ON_DENSE[algorithm](expected, limit)
    assert_same(parameters, expected, **TIGHT)
    for parameter, grad in zip(parameters, grads, strict=True):
        assert parameter.grad.layout == grad.layout
        assert not grad.is_sparse or parameter.grad.is_coalesced()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_rows_that_occur_twice_are_one(algorithm):
    """Two rows of 3 and -2 are one of 1; their own norm is 3.6."""
    grad = torch.sparse_coo_tensor([[4, 4]], [[3.0], [-2.0]], (6, 1), check_invariants=True)
    (parameter,) = holding(grad)
    gradients.clip_gradients([parameter], 1.5, algorithm)
    assert parameter.grad.to_dense()[4].item() == 1.0
    gradients.clip_gradients([parameter], 0.25, algorithm)
    assert parameter.grad.to_dense()[4].item() == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("wild", [torch.nan, torch.inf])
def test_wild_gradients_do_as_in_torch(algorithm, wild):
    grad = rows([1, 3, 3], (5, 2))
    grad._values()[0, 1] = wild
    parameters = holding(torch.randn(3, dtype=torch.float64), rows([1], (4,)), grad)
    expected = dense(parameters)
    gradients.clip_gradients(parameters, 0.5, algorithm)
    ON_DENSE[algorithm](expected, 0.5)
    # A product with 0 makes nan of the zeros beside an infinite row; a sparse tensor has none.
    touched = [p.grad.is_sparse for p in parameters]
    for one, other, is_sparse in zip(parameters, expected, touched, strict=True):
        where = one.grad._indices()[0] if is_sparse else slice(None)
        assert_close(one.grad.to_dense()[where], other.grad[where], equal_nan=True)


def test_low_precision_norms_are_summed_in_float32():
    """In bfloat16 4096 ones, one by one, sum to 256."""
    parameters = holding(
        rows(range(64), (64, 64), torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
    )
    exact = torch.cat([p.grad.to_dense().double().flatten() for p in parameters]).norm()
    before = parameters[1].grad.clone()
    gradients.clip_gradients(parameters, 1.0, "norm")
    assert parameters[1].grad.dtype == torch.bfloat16
    assert_close(parameters[1].grad, before * (1 / exact).bfloat16(), rtol=2**-7, atol=0)


def test_float16_norms_do_not_overflow():
    values = torch.full((2, 3), 4e4, dtype=torch.float16)
    grad = torch.sparse_coo_tensor([[0, 2]], values, (3, 3), check_invariants=True)
    parameters = holding(grad)  # of norm 97,980
    exact = parameters[0].grad.to_dense().double()
    gradients.clip_gradients(parameters, 1.0, "norm")
    assert_close(parameters[0].grad.to_dense().double(), exact / exact.norm(), rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("limit", [-0.5, torch.nan])
def test_refuses_a_limit_that_would_turn_gradients_round(algorithm, limit):
    (parameter,) = holding(rows([1, 3], (5, 2)))
    before = parameter.grad.to_dense()
    with pytest.raises(ValueError, match=f"must be at least 0, got {limit}"):
        gradients.clip_gradients([parameter], limit, algorithm)
    assert torch.equal(parameter.grad.to_dense(), before)
    gradients.clip_gradients([parameter], 0.0, algorithm)
    assert not parameter.grad.to_dense().any()


def test_parameters_without_gradients_are_left_alone():
    parameters = [nn.Parameter(torch.zeros(3))]
    for algorithm in ("norm", "value"):
        gradients.clip_gradients(parameters, 1.0, algorithm)
    assert parameters[0].grad is None
    assert not gradients.any_unusual(parameters)
    assert gradients.any_unusual([*parameters, *holding(rows([1], (3,)))])


class SparseBias(nn.Module):
    """A part that names its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 5)

    def sparse_parameters(self):
        return [self.inner.bias]


def test_modules_name_their_sparse_parameters():
    model = nn.ModuleDict(
        {
            "words": WordEmbedding(7, 3, sparse=True),
            "dense": WordEmbedding(7, 3),
            "bag": nn.EmbeddingBag(7, 3, sparse=True),
            "adaptive": AdaptiveEmbedding(20, 4, cutoffs=[5, 9], sparse=True),
            "dense_adaptive": AdaptiveEmbedding(20, 4, cutoffs=[5, 9]),
            "head": FullSoftmax(4, 7),
            "bias": SparseBias(),
            "frozen": WordEmbedding(7, 3, sparse=True).requires_grad_(False),
        }
    )
    assert list(gradients.sparse_parameters(model)) == [
        "words.weight",
        "bag.weight",
        "adaptive.weight",
        "adaptive.tail_weights.0",
        "adaptive.tail_weights.1",
        "bias.inner.bias",
    ]


class Wrapping(FullSoftmax):
    """A head that names no parameters, with an embedding within."""

    def __init__(self, sparse):
        super().__init__(4, 7)
        self.inner = nn.Embedding(7, 3, sparse=sparse)


def test_an_embedding_within_a_head_speaks_for_itself():
    assert list(gradients.sparse_parameters(nn.Sequential(Wrapping(True)))) == ["0.inner.weight"]
    assert not gradients.sparse_parameters(nn.Sequential(Wrapping(False)))
    naming = SparseBias()
    naming.words = nn.Embedding(7, 3, sparse=True)
    assert list(gradients.sparse_parameters(naming)) == ["inner.bias", "words.weight"]


def test_a_module_names_parameters_of_one_that_names_its_own():
    outer = SparseBias()
    outer.inner = SparseBias()
    outer.sparse_parameters = lambda: [outer.inner.inner.weight]
    assert list(gradients.sparse_parameters(outer)) == ["inner.inner.weight", "inner.inner.bias"]


@pytest.mark.parametrize("encoder", [LSTMEncoder, TransformerEncoder])
def test_encoders_take_sparse_embeddings(encoder):
    made = encoder(9, embedding=partial(WordEmbedding, sparse=True))
    made(torch.tensor([[1, 2, 1]]))[0].sum().backward()
    sparse = gradients.sparse_parameters(made)
    assert list(sparse) == ["embedding.weight"]
    for name, parameter in made.named_parameters():
        assert parameter.grad.is_sparse == (name in sparse)


def test_sharing_needs_sparse_gradients_on_both_sides():
    model = nn.ModuleDict({"a": WordEmbedding(7, 3, sparse=True), "b": WordEmbedding(7, 3)})
    model["b"].weight = model["a"].weight
    message = "a.weight and b.weight are one parameter, with sparse gradients here"
    with pytest.raises(ValueError, match=message):
        gradients.sparse_parameters(model)
    model["a"].sparse, model["b"].sparse = False, True
    with pytest.raises(ValueError, match=r"^b.weight and a.weight"):
        gradients.sparse_parameters(model)
    model["a"].sparse = True
    assert list(gradients.sparse_parameters(model)) == ["a.weight"]


def optimizers():
    """Every optimizer of torch with options, and what is wrong about it; None if nothing is."""
    optim = torch.optim
    for name in optim.__all__:
        kind = getattr(optim, name)
        if isinstance(kind, type) and kind not in (*gradients.TRAINS_ON_SPARSE, optim.Optimizer):
            yield kind, {}, f"{name} does not go with the sparse gradients of 0.weight"
    for made in (optim.Adagrad, partial(optim.SGD, lr=0.1)):
        name = getattr(made, "__name__", "SGD")
        for option in ("foreach", "maximize"):
            yield made, {option: True}, None
        yield made, {}, None
        yield made, {"weight_decay": 0.1}, f"{name} with weight_decay=0.1 .*weight_decay to 0,"
        yield made, {"fused": True}, f"{name} with fused=True .*fused to false,"
    yield optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.1}, None
    yield optim.SGD, {"momentum": 0.9}, "SGD with momentum=0.9 .*momentum to 0,"
    yield optim.SGD, {"momentum": 0.9, "nesterov": True}, "SGD with momentum=0.9"
    yield optim.SparseAdam, {}, "SparseAdam takes sparse gradients alone, and those of 1"


@pytest.mark.parametrize(("kind", "options", "message"), list(optimizers()))
def test_refuses_what_fails_at_the_first_step(kind, options, message):
    """Checked against the first two steps: what is let pass trains, what is refused does not."""
    model = nn.Sequential(WordEmbedding(6, 3, sparse=True), nn.Linear(3, 2, bias=False))
    optimizer = kind(model.parameters(), **options)
    sparse = gradients.sparse_parameters(model)

    def steps():
        for _ in range(2):
            model(torch.tensor([1, 1, 4])).square().sum().backward()
            optimizer.step()

    torch.sparse.check_sparse_tensor_invariants.disable()
    if message is None:
        gradients.check_optimizer(optimizer, sparse)
        steps()
        return
    with pytest.raises(ValueError, match=message) as caught:
        gradients.check_optimizer(optimizer, sparse)
    assert "\n" not in str(caught.value)
    if "alone" not in message:
        assert "0.weight" in str(caught.value)
    if "momentum" not in options and kind is not torch.optim.LBFGS:
        with pytest.raises(RuntimeError):
            steps()


def test_every_optimizer_is_tried():
    kinds = {getattr(kind, "func", kind) for kind, *_ in optimizers()}
    assert {kind.__name__ for kind in kinds} >= {"Adam", "LBFGS", "Muon", "Adagrad", "SparseAdam"}


def test_lbfgs_would_make_sparse_gradients_dense():
    embedding = WordEmbedding(6, 3, sparse=True)
    optimizer = torch.optim.LBFGS(embedding.parameters())

    def closure():
        optimizer.zero_grad()
        loss = embedding(torch.tensor([1])).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    direction = optimizer.state[embedding.weight]["d"]
    assert direction.layout == torch.strided
    assert direction.numel() == embedding.weight.numel()


def test_momentum_would_keep_the_rows_of_every_step():
    embedding = WordEmbedding(6, 3, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1, momentum=0.9)
    for row in range(5):
        optimizer.zero_grad()
        embedding(torch.tensor([row])).sum().backward()
        optimizer.step()
    assert optimizer.state[embedding.weight]["momentum_buffer"]._nnz() == 5


def test_sparse_adam_is_taken_where_all_is_sparse():
    embedding = WordEmbedding(6, 3, sparse=True)
    sparse = gradients.sparse_parameters(embedding)
    gradients.check_optimizer(torch.optim.SparseAdam(embedding.parameters()), sparse)


class Own(torch.optim.Adam):
    """An optimizer that torch does not know."""


def test_other_optimizers_and_groups_without_sparse_gradients_pass():
    model = nn.Sequential(WordEmbedding(6, 3, sparse=True), nn.Linear(3, 2))
    sparse = gradients.sparse_parameters(model)
    gradients.check_optimizer(Own(model.parameters()), sparse)
    gradients.check_optimizer(torch.optim.AdamW(model[1].parameters()), sparse)
    gradients.check_optimizer(torch.optim.AdamW(model.parameters()), {})
    groups = [{"params": model[1].parameters(), "weight_decay": 0.1}, {"params": [model[0].weight]}]
    gradients.check_optimizer(torch.optim.Adagrad(groups), sparse)


@pytest.mark.parametrize("option", ["lr", "weight_decay", "eps"])
def test_numbers_beyond_float32_are_refused(option):
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=rf"Adam cannot step by {option}=1e\+300"):
        gradients.check_optimizer(torch.optim.Adam([parameter], **{option: 1e300}), {})
    gradients.check_optimizer(torch.optim.Adam([parameter], **{option: 1e38}), {})


def test_names_a_few_of_many():
    sparse = {str(i): nn.Parameter(torch.zeros(1)) for i in range(5)}
    optimizer = torch.optim.Adam(sparse.values())
    with pytest.raises(ValueError, match=re.escape("of 0, 1, 2 and 2 more: ")):
        gradients.check_optimizer(optimizer, sparse)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.SGD])
def test_steps_of_a_training_are_not_differentiable(kind, sparse):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = kind([parameter], differentiable=True)
    if sparse and kind is torch.optim.AdamW:
        message = "AdamW does not go with the sparse gradients of weight"
    else:
        message = rf"{kind.__name__} with differentiable=True does not step .* to false"
    with pytest.raises(ValueError, match=message):
        gradients.check_optimizer(optimizer, {"weight": parameter} if sparse else {})
