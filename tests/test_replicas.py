"""Replicas of a model with sparse gradients: what is refused, what is shown, and their average."""

import socket

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from test_gradients import SparseBias
from torch import nn

from lm_softmax import gradients, replicas
from lm_softmax.encoders import AdaptiveEmbedding, WordEmbedding


def strategy(kind, **attributes):
    made = kind.__new__(kind)
    made.__dict__.update(attributes)
    return made


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_refuses_strategies_that_shard(kind):
    model = WordEmbedding(6, 3, sparse=True)
    with pytest.raises(ValueError, match=f"{kind.__name__} does not shard weight.*sparse to false"):
        replicas.prepare(model, strategy(kind))
    replicas.prepare(WordEmbedding(6, 3), strategy(kind))


@pytest.mark.parametrize(
    ("config", "device", "refused"),
    [
        ("cuda:nccl", "cuda", "nccl"),
        ("cpu:gloo,cuda:nccl", "cuda", "nccl"),
        ("cpu:gloo,cuda:nccl", "cpu", None),
        ("cpu:gloo,cuda:gloo", "cuda", None),
        ("cpu:mpi,cuda:mpi", "cpu", "mpi"),
    ],
)
def test_ranks_need_gloo(config, device, refused, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda: config)
    model = nn.Sequential(AdaptiveEmbedding(20, 4, cutoffs=[5, 9], sparse=True), nn.Linear(4, 2))
    names = list(dict(model.named_modules()))
    one = strategy(DDPStrategy, parallel_devices=[torch.device(device)])
    monkeypatch.setattr(DDPStrategy, "root_device", torch.device(device))
    if refused is None:
        replicas.prepare(model, one)
        assert "configure_ddp" in vars(one)
    else:
        message = f"{refused} does not reduce the sparse gradients of .* on {device}: set sparse"
        with pytest.raises(ValueError, match=message) as caught:
            replicas.prepare(model, one)
        assert "\n" not in str(caught.value)
    assert list(dict(model.named_modules())) == names
    replicas.prepare(nn.Linear(2, 2), one)
    assert "configure_ddp" not in vars(one)  # that of the other model is gone


class Wrapped(DDPStrategy):
    """Keeps what `DistributedDataParallel` would be given."""

    root_device = torch.device("cpu")
    fails = False

    def configure_ddp(self):
        self.order = list(self.model.parameters())
        self.asked = [
            next(m for m in self.model.modules() if any(p is q for q in m._parameters.values()))
            for p in self.order
        ]
        if self.fails:
            raise RuntimeError("no wrapping")


@pytest.fixture
def gloo(monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo")


def aliased():
    """The embedding has two names, one of them in the head, and a third child is None."""
    model = nn.Module()
    model.body = nn.Linear(3, 3)
    model.words = AdaptiveEmbedding(20, 4, cutoffs=[5, 9], sparse=True)
    model.nothing = None
    model.again = model.words
    model.bias = SparseBias()
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_sparse_parameters_are_shown_in_embeddings_while_wrapped(fails, gloo):
    model = aliased()
    children, weights = list(model._modules.items()), list(model.state_dict())
    one = strategy(Wrapped, _model=model, fails=fails)
    sparse = gradients.sparse_parameters(model)
    before = torch.get_rng_state()
    for _ in range(2):  # a second training of one strategy, and after a failure
        replicas.prepare(model, one)
        replicas.prepare(model, one)
        assert list(model._modules.items()) == children
        if fails:
            with pytest.raises(RuntimeError, match="no wrapping"):
                one.configure_ddp()
        else:
            one.configure_ddp()
        assert len(one.order) == len(list(model.parameters()))
        for parameter, asked in zip(one.order, one.asked, strict=True):
            expects = isinstance(asked, nn.Embedding) and asked.sparse
            assert expects == any(parameter is p for p in sparse.values())
        assert list(model._modules.items()) == children
        assert list(model.state_dict()) == weights
        assert "configure_ddp" not in vars(one)
    assert torch.equal(torch.get_rng_state(), before)


class Holding(nn.Module):
    """A model that is no module of modules alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4, 2))
        self.words = WordEmbedding(6, 3, sparse=True)

    def sparse_parameters(self):
        return [self.table]


def test_refuses_a_sparse_parameter_of_the_model_itself(gloo):
    message = "meets table in Holding itself and expects dense gradients there"
    with pytest.raises(ValueError, match=message) as caught:
        replicas.prepare(Holding(), strategy(Wrapped))
    assert "\n" not in str(caught.value)
    replicas.prepare(Holding(), strategy(SingleDeviceStrategy))
    replicas.prepare(WordEmbedding(6, 3, sparse=True), strategy(Wrapped))  # it is asked itself


def test_one_device_needs_nothing():
    model = nn.Sequential(WordEmbedding(6, 3, sparse=True))
    one = strategy(SingleDeviceStrategy)
    replicas.prepare(model, one)
    assert not vars(one)
    assert list(dict(model.named_modules())) == ["", "0"]


@pytest.mark.parametrize("asked", [True, False])
def test_checks_of_sparse_tensors_stay_as_they_were(asked):
    checks = torch.sparse.check_sparse_tensor_invariants
    try:
        (checks.enable if asked else checks.disable)()
        replicas.prepare(WordEmbedding(6, 3, sparse=True), strategy(SingleDeviceStrategy))
        assert checks.is_enabled() is asked
    finally:
        checks.disable()


def test_refuses_a_hook_that_lightning_would_register(monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:gloo")
    model = nn.Sequential(WordEmbedding(6, 3, sparse=True))
    for device, refused in (("cuda", True), ("cpu", False)):  # on a CPU it registers none
        monkeypatch.setattr(DDPStrategy, "root_device", torch.device(device))
        one = DDPStrategy(ddp_comm_hook=lambda *_: None)
        if refused:
            with pytest.raises(ValueError, match=r"ddp_comm_hook does not go with .* 0.weight: "):
                replicas.prepare(model, one)
        else:
            replicas.prepare(model, one)


def sparse_gradient(rank, number):
    """Rows that occur twice, no rows, one or two sparse dimensions, rows of any shape."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    shape = [(7,), (7, 3), (7, 3, 2)][number % 3]
    num_sparse = 1 + (number % 2) * (len(shape) > 1)
    num_rows = 0 if number % 7 == 6 else [0, 5, 1, 12][(number + rank * (1 + number // 12)) % 4]
    indices = torch.randint(3, (num_sparse, num_rows), generator=generator)
    values = torch.randn(num_rows, *shape[num_sparse:], generator=generator, dtype=torch.float64)
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)


def average_all(rank, port, size):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    found, expected, rows = [], [], []
    for number in range(36):  # all under way before the first is awaited
        each_rank = [sparse_gradient(each, number) for each in range(size)]
        rows.append(len({(*row,) for one in each_rank for row in one._indices().t().tolist()}))
        every = [each.to_dense() for each in each_rank]
        for gradient in (sparse_gradient(rank, number), every[rank].clone()):
            found.append(replicas.average(dist.group.WORLD, gradient))
            expected.append(torch.stack(every).mean(0))
    for future, mean in zip(found, expected, strict=True):
        given = future.wait()
        torch.testing.assert_close(given.to_dense(), mean, rtol=1e-14, atol=1e-14)
        if given.is_sparse:  # an optimizer steps each row that is there
            assert given._nnz() == rows.pop(0)
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_average_is_that_of_dense_gradients():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(average_all, (port, 3), nprocs=3)
