"""What a layer looks at in its cell."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from implicit_core.finished import ChangingFunctionWarning
from implicit_core.warnings_ import warn

DRAWING = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout
COMMUNICATING = frozenset(("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional"))
"""Namespaces of operations between processes."""
UPDATING = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm


def trained(cell: object) -> dict[str, Tensor]:
    """The values of a cell's parameters that require a gradient."""
    named = cell.named_parameters() if isinstance(cell, nn.Module) else ()
    return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """A module in eval mode. At the end each of its submodules returns to its own mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def refuse_outside(cell: nn.Module, left_out: list[Tensor]) -> None:
    """Raise if F depends on tensors that require a gradient besides the cell's parameters."""
    if left_out:
        found = ", ".join(_described(cell, x) for x in left_out)
        raise ValueError(
            f"the cell uses tensors that require a gradient and are not its own parameters: {found}. The layer "
            "differentiates them, but the conditions would leave them out: compute them in forward, make other modules "
            "submodules of the cell, or put all that is trained in z, and call implicit_core.theory.certify"
        )


def _described(cell: nn.Module, x: Tensor) -> str:
    """A tensor by its shape and, if a module of the cell has it as an attribute, its name."""
    shape, origin = f"shape {tuple(x.shape)}", "" if x.is_leaf else ", computed outside of forward"
    for path, part in cell.named_modules():
        for attribute, value in vars(part).items():
            if value is x:
                return f"{path + '.' if path else ''}{attribute} ({shape}{origin})"
    return f"one of {shape}{origin}"


def notice_changes(cell: object, *, draws: bool) -> None:
    """Warn of modules that update statistics at every evaluation of F, and if ``draws`` of those that draw anew."""
    parts = [part for part in cell.modules() if part.training] if isinstance(cell, nn.Module) else []
    drawing = [part for part in parts if draws and isinstance(part, DRAWING) and part.p > 0]
    updating = [part for part in parts if isinstance(part, UPDATING) and part.track_running_stats]
    if drawing:
        warn(
            f"the cell has {_named(drawing)} in train mode, which draws another mask at every evaluation of F, so "
            "there is no fixed point: use VariationalDropout of implicit_core.adapters.torch, which keeps its mask "
            "within a solve. replace_dropout(cell) replaces the dropout modules of a library by it",
            ChangingFunctionWarning,
            once=True,
        )
    if updating:
        warn(
            f"the cell has {_named(updating)} in train mode, which couples the samples of a batch and updates its "
            "statistics at every evaluation of F: use GroupNorm or LayerNorm, or put it outside of the cell",
            ChangingFunctionWarning,
            once=True,
        )


def _named(parts: Iterable[nn.Module]) -> str:
    return ", ".join(sorted({type(part).__name__ for part in parts}))


def check_not_sharded(cell: object) -> None:
    """Raise if the cell is sharded, which would end in a deadlock (Decision 41)."""
    from torch.distributed.fsdp import FSDPModule  # a slow import, needed only in a group of processes

    if isinstance(cell, nn.Module) and any(
        isinstance(m, (FSDPModule, DistributedDataParallel)) for m in cell.modules()
    ):
        raise RuntimeError(
            "the cell is distributed over processes, so they would communicate at every evaluation, but each process "
            "stops after its own number of steps: wrap the ImplicitLayer, or the model, in fully_shard or "
            "DistributedDataParallel, not the cell or a part of it"
        )


class Collectives(TorchDispatchMode):
    """Notes the operations that communicate with other processes (Decision 135).

    Attributes
    ----------
    found
        Their names.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry an operation out."""
        if func.namespace in COMMUNICATING:
            self.found.add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def refuse_collectives(cell: object, evaluate: Callable[[], object]) -> None:
    """Raise if an evaluation of the cell communicates, unless its parameters are distributed tensors.

    Those compute the same numbers in all processes, so that all stop at the same step. All processes evaluate here.
    """
    from torch.distributed.tensor import DTensor  # a slow import, needed only in a group of processes

    if isinstance(cell, nn.Module) and any(isinstance(x, DTensor) for x in cell.parameters()):
        return
    with Collectives() as communication:
        evaluate()
    if communication.found:
        names = ", ".join(sorted(communication.found))
        raise RuntimeError(
            f"the cell communicates with other processes ({names}), as SyncBatchNorm does in train mode, but each "
            "process stops after its own number of steps, and then the others wait for ever: use GroupNorm or "
            "LayerNorm, or move the communication out of the cell"
        )
