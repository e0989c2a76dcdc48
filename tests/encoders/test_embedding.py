"""Embeddings against a dense table."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from lm_softmax.encoders import AdaptiveEmbedding, WordEmbedding
from lm_softmax.encoders import embedding as embedding_module
from lm_softmax.heads import AdaptiveSoftmax

TIGHT = {"atol": 1e-10, "rtol": 1e-10}


def dense_table(embedding):
    """The whole table that an adaptive embedding stands for, row by row."""
    clusters = [embedding.weight]
    for table, projection in zip(embedding.tail_weights, embedding.projections, strict=True):
        clusters.append(torch.einsum("ns,se->ne", table, projection))
    return torch.cat(clusters)


@st.composite
def embeddings(draw):
    vocab_size = draw(st.integers(1, 30))
    ids = st.integers(1, max(1, vocab_size - 1))
    cutoffs = sorted(draw(st.sets(ids, max_size=4))) if vocab_size > 1 else []
    torch.manual_seed(draw(st.integers(0, 99)))
    return AdaptiveEmbedding(
        vocab_size,
        draw(st.integers(1, 9)),
        cutoffs=cutoffs,
        div_value=draw(st.sampled_from([1.0, 1.7, 4.0])),
        min_tail_size=draw(st.integers(1, 3)),
    ).double()


@settings(max_examples=80, deadline=None)
@given(embedding=embeddings(), reads_are_cheap=st.booleans(), data=st.data())
def test_equals_a_lookup_in_the_dense_table(embedding, reads_are_cheap, data):
    shape = data.draw(st.sampled_from([(), (1,), (0,), (3, 5), (2, 1, 4)]))
    tokens = torch.randint(embedding.num_embeddings, shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_module, "reads_are_cheap", lambda _: reads_are_cheap)
        found = embedding(tokens)
    expected = dense_table(embedding)[tokens]
    assert found.shape == (*shape, embedding.embedding_size)
    assert_close(found, expected, **TIGHT)

    weights = torch.randn(found.shape, dtype=torch.float64)
    parameters = list(embedding.parameters())
    gradients = torch.autograd.grad((found * weights).sum(), parameters)
    naive = torch.autograd.grad((expected * weights).sum(), parameters)
    for gradient, reference in zip(gradients, naive, strict=True):
        assert_close(gradient, reference, **TIGHT)


def test_absent_clusters_get_zero_gradients():
    embedding = AdaptiveEmbedding(12, 4, cutoffs=[3, 6], min_tail_size=2)
    embedding(torch.tensor([[4, 5, 4]])).sum().backward()
    assert not embedding.weight.grad.any()
    assert not embedding.tail_weights[1].grad.any()
    assert not embedding.projections[1].grad.any()
    assert embedding.tail_weights[0].grad.any()


@pytest.mark.parametrize("cutoffs", [[], [3], [3, 6]])
@pytest.mark.parametrize("token", [-1, 12])
def test_an_id_outside_the_vocabulary_is_an_index_error(cutoffs, token):
    embedding = AdaptiveEmbedding(12, 4, cutoffs=cutoffs)
    with pytest.raises(IndexError):
        embedding(torch.tensor([0, token]))


@settings(max_examples=40, deadline=None)
@given(embedding=embeddings(), seed=st.integers(0, 99))
def test_sparse_gradients_are_the_dense_ones(embedding, seed):
    torch.manual_seed(seed)
    tokens = torch.randint(embedding.num_embeddings, (3, 5))
    size = embedding.embedding_size
    word, options = WordEmbedding(embedding.num_embeddings, size).double(), embedding.structure()
    sparse_word = WordEmbedding(embedding.num_embeddings, size, sparse=True).double()
    sparse = AdaptiveEmbedding(embedding.num_embeddings, size, **options, sparse=True).double()
    for dense_one, sparse_one in ((embedding, sparse), (word, sparse_word)):
        sparse_one.load_state_dict(dense_one.state_dict())
        weights = torch.randn(3, 5, size, dtype=torch.float64)
        for one in (dense_one, sparse_one):
            one.zero_grad()
            (one(tokens) * weights).sum().backward()
        names = {"weight", *(f"tail_weights.{i}" for i in range(len(embedding.cutoffs)))}
        for name, parameter in sparse_one.named_parameters():
            expected = dense_one.get_parameter(name).grad
            assert not expected.is_sparse
            assert parameter.grad.is_sparse == (name in names)
            assert_close(parameter.grad.to_dense(), expected, **TIGHT)


def test_sparse_is_an_option_by_name_and_off_by_default():
    assert not WordEmbedding(5, 2).sparse
    assert WordEmbedding(5, 2, None, sparse=True).sparse
    assert AdaptiveEmbedding(5, 2).sparse_parameters() == []
    embedding = AdaptiveEmbedding(12, 4, cutoffs=[3], sparse=True)
    tables = [embedding.weight, *embedding.tail_weights]
    for found, table in zip(embedding.sparse_parameters(), tables, strict=True):
        assert found is table
    with pytest.raises(TypeError):
        WordEmbedding(5, 2, None, True)


@pytest.mark.parametrize("kind", [WordEmbedding, partial(AdaptiveEmbedding, cutoffs=[3, 6])])
def test_sparse_embeddings_compile(kind):
    embedding = kind(12, 4, sparse=True)
    torch.compile(embedding, fullgraph=True, backend="aot_eager")(torch.arange(4)).sum().backward()
    assert embedding.weight.grad.is_sparse


def test_the_graph_does_not_depend_on_the_tokens():
    embedding = AdaptiveEmbedding(12, 4, cutoffs=[3, 6], min_tail_size=2)
    compiled = torch.compile(embedding, fullgraph=True, backend="eager")
    for tokens in (torch.arange(12), torch.zeros(12, dtype=torch.int64)):
        assert_close(compiled(tokens), dense_table(embedding)[tokens])


def test_shapes_are_those_of_the_adaptive_softmax():
    embedding = AdaptiveEmbedding(100, 32, cutoffs=[10, 40, 100])
    assert (embedding.num_embeddings, embedding.embedding_size) == (100, 32)
    assert embedding.cutoffs == [10, 40]
    assert embedding.tail_sizes == [16, 16]
    assert embedding.weight.shape == (10, 32)
    assert [tuple(table.shape) for table in embedding.tail_weights] == [(30, 16), (60, 16)]
    assert [tuple(matrix.shape) for matrix in embedding.projections] == [(16, 32), (16, 32)]


def test_automatic_cutoffs_follow_the_counts_and_are_pinned():
    counts = torch.tensor([100_000, *[1] * 2999])
    embedding = AdaptiveEmbedding(3000, 32, counts)
    assert embedding.cutoffs == AdaptiveSoftmax(32, 3000, counts).cutoffs != []
    assert AdaptiveEmbedding(3000, 32).cutoffs != embedding.cutoffs
    pinned = AdaptiveEmbedding(3000, 32, **embedding.structure())
    assert pinned.cutoffs == embedding.cutoffs
    assert pinned.tail_sizes == embedding.tail_sizes


def test_embeddings_start_with_unit_length_in_every_cluster():
    torch.manual_seed(0)
    embedding = AdaptiveEmbedding(6000, 64, cutoffs=[2000, 4000])
    lengths = dense_table(embedding).square().sum(-1).split(2000)
    assert all(abs(part.mean() - 1) < 0.1 for part in lengths)
    lengths = WordEmbedding(2000, 64).weight.square().sum(-1)
    assert abs(lengths.mean() - 1) < 0.02


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"cutoffs": [4, 4]}, r"\[4, 4\]"),
        ({"cutoffs": [0, 4]}, r"\[0, 4\]"),
        ({"cutoffs": [4, 13]}, r"\[4, 13\]"),
        ({"cutoffs": [4], "min_tail_size": 0, "div_value": 100.0}, r"\[0\]"),
        ({"cutoffs": [4, 8], "tail_sizes": [2]}, r"2 tails.*\[2\]"),
        ({"cutoffs": [4], "tail_sizes": [0]}, r"1 tails.*\[0\]"),
    ],
)
def test_refuses_impossible_clusters(options, shown):
    with pytest.raises(ValueError, match=shown):
        AdaptiveEmbedding(12, 4, **options)


@pytest.mark.parametrize("kind", [AdaptiveEmbedding, WordEmbedding])
def test_refuses_sizes_below_one(kind):
    with pytest.raises(ValueError, match="embedding_size must be at least 1, got 0"):
        kind(5, 0)


class TestWhereValuesMeanNothing:
    """What follows the operations of some tokens must serve others too."""

    @pytest.fixture
    def adaptive(self):
        return AdaptiveEmbedding(30, 8, cutoffs=[5, 12], min_tail_size=2)

    @pytest.mark.parametrize("trace", [torch.jit.trace, lambda f, x: make_fx(f)(x)])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_a_trace(self, adaptive, trace):
        traced = trace(adaptive, torch.tensor([0, 1, 20, 21]))
        tokens = torch.tensor([2, 14, 16, 25])
        assert_close(traced(tokens), dense_table(adaptive)[tokens])

    def test_a_transform(self, adaptive):
        tokens = torch.randint(30, (4, 7))
        assert_close(torch.vmap(adaptive)(tokens), dense_table(adaptive)[tokens])

    def test_tensors_without_values(self, adaptive):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert adaptive(mode.from_tensor(torch.arange(6).view(2, 3))).shape == (2, 3, 8)
