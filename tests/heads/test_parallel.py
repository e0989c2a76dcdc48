"""A head under FSDP2: parameters in shards, every public method registered."""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import counts_of, randomise
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.testing import assert_close

from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax

PUBLIC_METHODS = ("loss", "log_prob", "topk", "sample")


def check(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for make in (FullSoftmax, AdaptiveSoftmax):
        options = {"cutoffs": [10, 30]} if make is AdaptiveSoftmax else {}
        torch.manual_seed(0)
        whole = randomise(make(12, 50, counts_of(50), **options))
        hidden, target = torch.randn(2, 9, 12), torch.randint(50, (2, 9))
        target[0] = target[0].clamp(max=9)  # rank 0 hits the short-list alone
        sharded = fully_shard(copy.deepcopy(whole), mesh=mesh)
        for method in PUBLIC_METHODS:
            register_fsdp_forward_method(sharded, method)
        expected = whole.loss(hidden, target)
        expected.backward()
        loss = sharded.loss(hidden[rank], target[rank])
        loss.backward()  # FSDP averages over ranks that hold as many targets
        total = loss.detach().clone()
        dist.all_reduce(total)
        assert_close(total / 2, expected.detach())
        for (name, ours), theirs in zip(
            sharded.named_parameters(), whole.parameters(), strict=True
        ):
            assert_close(ours.grad.full_tensor(), theirs.grad, msg=lambda m, n=name: f"{n}: {m}")
        assert_close(sharded.log_prob(hidden[rank]), whole.log_prob(hidden[rank]))
        assert (sharded.topk(hidden[rank], 3).indices == whole.topk(hidden[rank], 3).indices).all()
        assert sharded.sample(hidden[rank], 2).shape == (9, 2)
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store needs POSIX paths")
def test_sharded_heads_equal_whole_ones(tmp_path):
    mp.spawn(check, args=(tmp_path,), nprocs=2)
