"""Every head on two processes: DDP without unused parameters, and FSDP2 with all public methods."""

import copy
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import CASES, counts_of, randomise
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

PUBLIC_METHODS = ("loss", "log_prob", "topk", "search", "sample")
OPTIONS = ({}, {"temperature": 0.5}, {"temperature": 2}, {"top_k": 3, "top_p": 0.5}, {"top_p": 0.5})


def problem(case):
    torch.manual_seed(0)
    whole = randomise(case.make(12, 50, counts_of(50)))
    hidden, target = torch.randn(2, 9, 12), torch.randint(50, (2, 9))
    target[0] = target[0].clamp(max=9)  # rank 0 hits the short-list alone
    return whole, hidden, target


def total(head, hidden, target):
    torch.manual_seed(1)  # the same negatives on both ranks and in the whole
    return head(hidden, target)


def check_replica(case, rank):
    whole, hidden, target = problem(case)
    replica = DistributedDataParallel(copy.deepcopy(whole))
    total(whole, hidden, target).backward()
    for _ in range(2):  # a gradient that is missing is an error of the second step
        replica.zero_grad()
        total(replica, hidden[rank], target[rank]).backward()
    for (name, ours), theirs in zip(
        replica.module.named_parameters(), whole.parameters(), strict=True
    ):
        place = f"{case.name}, {name}"
        assert_close(ours.grad, theirs.grad, msg=lambda m, p=place: f"{p}: {m}")


def check_shards(case, rank):
    whole, hidden, target = problem(case)
    sharded = fully_shard(copy.deepcopy(whole), mesh=init_device_mesh("cpu", (2,)))
    for method in filter(partial(hasattr, sharded), PUBLIC_METHODS):
        register_fsdp_forward_method(sharded, method)
    expected = total(whole, hidden, target)
    expected.backward()
    loss = total(sharded, hidden[rank], target[rank])
    loss.backward()  # FSDP averages over ranks that hold as many targets
    both = loss.detach().clone()
    dist.all_reduce(both)
    assert_close(both / 2, expected.detach(), msg=lambda m: f"{case.name}: {m}")
    for (name, ours), theirs in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        place = f"{case.name}, {name}"
        assert_close(ours.grad.full_tensor(), theirs.grad, msg=lambda m, p=place: f"{p}: {m}")
    assert_close(sharded.log_prob(hidden[rank]), whole.log_prob(hidden[rank]))
    assert (sharded.topk(hidden[rank], 3).indices == whole.topk(hidden[rank], 3).indices).all()
    for options in OPTIONS:
        assert sharded.sample(hidden[rank], 2, **options).shape == (9, 2)


def check_all(rank, folder, check):
    """The wrapped heads are gone before their group: its last owner must not be one of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for case in CASES:
        check(case, rank)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store needs POSIX paths")
@pytest.mark.parametrize("check", [check_replica, check_shards])
def test_two_processes_equal_one(check, tmp_path):
    mp.spawn(check_all, args=(tmp_path, check), nprocs=2)
