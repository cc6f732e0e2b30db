"""One of several processes that train a model with an implicit layer and compare its gradients with a single process.

Run by test_torch_training.py: ``python distributed_worker.py RANK WORLD FILE STRATEGY...``.
"""

import copy
import datetime
import sys

import recursive_models
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import implicit_core as ic
from implicit_core.adapters import torch as ict

TIMEOUT = datetime.timedelta(seconds=60)
SOLVER = ic.Anderson(rtol=1e-12, max_steps=200)
ESTIMATORS = [
    ic.Implicit(ic.GMRES(rtol=1e-12)),
    ic.Neumann(5, 0.5),
    ic.OneStep(),
    ic.Unroll(3, 0.5),
    ic.Unroll(3, 0.5, recompute=True),
]
THROUGH_ONCE = (ic.OneStep, ic.Unroll)
"""Estimators that a selective checkpoint can be around."""


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        for linear in (self.first, self.second):
            nn.init.orthogonal_(linear.weight, gain=0.7)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(h))) + x)


class Communicating(Cell):
    """A cell that subtracts the mean over all processes, as SyncBatchNorm does."""

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        y = super().forward(h, x)
        return y - 0.1 * all_reduce(y.mean(0)) / dist.get_world_size()


class Model(nn.Module):
    def __init__(self, gradient: ic.Estimator) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.layer = ict.ImplicitLayer(Cell(), solver=SOLVER, gradient=gradient)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.encoder(x)))


class Net(Cell):
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(h + x + self.second(torch.tanh(self.first(h))))


class Recursion(nn.Module):
    """A cell that applies one of its modules several times."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, state: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return recursive_models.recursion(self.net)(state, x)


class Recursive(nn.Module):
    """Recursions of which a random number has no graph, and another one has."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.layer = ict.ImplicitLayer(Recursion())

    def forward(self, x: Tensor, n: int, k: int) -> Tensor:
        start = torch.zeros(len(x), 6, dtype=x.dtype)
        options = {"solver": ic.steps(n), "gradient": ic.Unroll(k, 1.0)}
        y, _ = self.layer(self.encoder(x), h0=(start, start), **options)
        return self.head(y)


def distributed(model: Model, strategy: str) -> nn.Module:
    """``model``, in its hands."""
    if strategy == "ddp-cell":
        model.layer.cell = DistributedDataParallel(model.layer.cell)
        return model
    if strategy == "ddp-selective":
        saved = [torch.ops.aten.addmm.default]
        model.layer = checkpoint_wrapper(model.layer, context_fn=lambda: create_selective_checkpoint_contexts(saved))
    if strategy in ("ddp", "ddp-selective"):
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if strategy == "fsdp-cell":
        fully_shard(model.layer.cell, mesh=mesh)
    if strategy == "fsdp-layer":
        fully_shard(model.layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def main(rank: int, world: int, file: str, *strategies: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=TIMEOUT)
    torch.set_num_threads(1)
    for strategy in strategies:
        try:
            train_recursive(rank, world) if strategy == "ddp-recursive" else train(strategy, rank, world)
        except RuntimeError as error:
            print(f"{strategy} rank {rank}: RuntimeError: {error}")
    dist.barrier()  # nobody leaves while another still listens
    dist.destroy_process_group()


def train(strategy: str, rank: int, world: int) -> None:
    """Three steps with each estimator, alone and together."""
    if strategy == "communicating-cell":
        # Far from and near to its fixed point: the processes would stop at different steps.
        ict.ImplicitLayer(Communicating(), solver=SOLVER)(torch.randn(4, 6) * (3.0 if rank else 1e-3))
    for estimator in ESTIMATORS:
        if strategy == "ddp-selective" and not isinstance(estimator, THROUGH_ONCE):
            continue
        torch.manual_seed(0)
        alone = Model(estimator).double()
        x = torch.randn(4 * world, 4, dtype=torch.float64)
        together = distributed(copy.deepcopy(alone), strategy)
        for model, batch in ((alone, x), (together, x.chunk(world)[rank])):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                (model(batch) ** 2).mean().backward()
                optimizer.step()
        ours = {}
        for name, parameter in together.named_parameters():
            ours[name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")] = parameter
        for name, expected in alone.named_parameters():
            for got, wanted in ((ours[name], expected), (ours[name].grad, expected.grad)):
                got = got.full_tensor() if hasattr(got, "full_tensor") else got
                torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)
        print(f"{strategy} rank {rank}: {estimator} agrees")


def train_recursive(rank: int, world: int) -> None:
    """Ten steps, in which each process draws its own numbers of steps, of which some are 0. All parameters are used."""
    torch.manual_seed(0)
    alone = Recursive().double()
    together = DistributedDataParallel(copy.deepcopy(alone))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (alone, together)]
    for _ in range(10):
        x = torch.randn(4 * world, 4, dtype=torch.float64).chunk(world)
        depths = [(int(torch.randint(0, 3, ())), int(torch.randint(1, 3, ()))) for _ in x]
        of_all = [alone(part, *depth).square().mean() for part, depth in zip(x, depths, strict=True)]
        for loss in (sum(of_all) / world, together(x[rank], *depths[rank]).square().mean()):
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for got, wanted in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    print(f"ddp-recursive rank {rank}: a random number of steps agrees")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
