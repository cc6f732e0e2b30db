"""Whether the cotangents of an unrolled loop grow, looked at where they pass through the graph (Decision 78)."""

from typing import Any

import torch
from torch import Tensor

from implicit_core import settings
from implicit_core.arrays import H, Numbers, PyTree
from implicit_core.backends.torch import BACKEND
from implicit_core.estimators.growth import Terms
from implicit_core.space import Space

from .autograd import transforming
from .compilation import never_compiled
from .tensors import Tensors


class GrowthOfCotangents:
    """Compares the cotangents at two points of a graph, which autograd passes one after the other.

    A backward pass meets the end first, where the cotangent is kept, and then the start, where it is compared.

    Parameters
    ----------
    terms
        The estimator, whose test says what is compared, and what is done about it.
    batch_ndim, scale
        As in the problem.
    """

    def __init__(self, terms: Terms, batch_ndim: int, scale: PyTree = None) -> None:
        self.terms, self.test = terms, terms.growth
        self.batch_ndim = batch_ndim
        self.scale = scale
        self._at_end: Numbers | None = None
        self._differentiated = False

    def start(self, h: H) -> H:
        """The point that the backward pass meets last, with its graph."""
        return self._through(h, False)

    def end(self, h: H) -> H:
        """The point that the backward pass meets first, with its graph."""
        return self._through(h, True)

    def _through(self, h: H, at_end: bool) -> H:
        leaves, structure = BACKEND.flatten(h)
        through: H = BACKEND.unflatten(structure, list(_Watched.apply(self, at_end, *leaves)))  # type: ignore[no-untyped-call]  # torch's
        return through

    def keep(self, cotangents: Tensors) -> None:
        """Keep the norm of the cotangents at the end."""
        if not self._differentiated and not transforming():
            space = self._space(cotangents)
            terms = settings.bound(self.terms, space, constant=True)
            self._at_end = self.test.norm(space, terms.reference(space, space.pack(list(cotangents))))

    def compare(self, cotangents: Tensors) -> Tensors:
        """The cotangents at the start, after the test."""
        before, self._at_end = self._at_end, None
        # In the graph of a derivative, cotangents also join between the two points: they do not come from the end.
        self._differentiated |= torch.is_grad_enabled()
        if before is None or transforming():
            return cotangents
        space = self._space(cotangents)
        last = space.pack(list(cotangents))
        if not self.test.reads(space, last):
            return cotangents
        checked = self.test.checked_norm(space, before, last, last)
        return cotangents if checked is last else tuple(space.unpack(checked))

    def _space(self, cotangents: Tensors) -> Space:
        return BACKEND.space_of_leaves(cotangents, self.batch_ndim, "the cotangent", self.scale).dual


@never_compiled
class _Watched(torch.autograd.Function):
    """The identity, which shows its cotangents. A copy, since f and the caller may modify the result."""

    @staticmethod
    def forward(growth: GrowthOfCotangents, at_end: bool, *leaves: Tensor) -> Tensors:
        return tuple(x.clone() for x in leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.growth, ctx.at_end = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        growth: GrowthOfCotangents = ctx.growth
        if ctx.at_end:
            growth.keep(cotangents)
            return None, None, *cotangents
        return None, None, *growth.compare(cotangents)
