"""Derivatives that one framework lends to the arrays of another, which lie where they are: DLPack hands them over."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from .backend import Backend, PyTree
from .problem import BoundLinearization, Linearization, Problem
from .registry import find_backend, load_backend


def lend(problem: Problem, lender: str) -> Problem:
    """``problem``, which is about arrays of ``lender``, about arrays of any library on the same devices.

    Parameters
    ----------
    problem
        Made of functions on arrays of ``lender``.
    lender
        Name of that framework's root module, e.g. ``"torch"``.

    Returns
    -------
    Problem
        Its arguments and results are arrays of the library that its ``h`` is of. Nothing is copied, but what may only
        be read: the lender's functions work in the same memory. Where both have streams the lender works on the one
        that is current for the borrower, or waits for it.

    Raises
    ------
    ValueError
        If ``lender`` has no backend.
    TypeError, BufferError
        At a call, if an array can't be handed over: it is on a device, or of a dtype, that the lender doesn't have.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> import implicit_core as ic
    >>> from implicit_core.adapters import torch as ict
    >>> from implicit_core.lending import lend
    >>> problem = lend(ict.problem(lambda h, z: torch.cos(h) + z), "torch")
    >>> solution = ic.solve(problem, np.zeros(1), np.zeros(1))
    >>> solution.value.round(3)
    array([0.739])
    """
    there = load_backend(lender)

    def f(h: PyTree, z: PyTree) -> PyTree:
        with _Loan(find_backend(h, "h"), there).on(h) as loan:
            return loan.back(problem.f(loan.out(h), loan.out(z)))

    def linearize(h: PyTree, z: PyTree) -> Linearization:
        loan = _Loan(find_backend(h, "h"), there)
        with loan.on(h):
            at = problem.linearize(loan.out(h), loan.out(z))
            return Linearization(loan.back(at.value), **_handed_back(loan, at, h))

    return Problem(f, linearize=linearize, batch_ndim=problem.batch_ndim)


def _handed_back(loan: "_Loan", at: BoundLinearization, h: PyTree) -> dict[str, Callable[..., PyTree]]:
    """The derivatives that ``at`` has, as functions of the borrower's arrays."""

    def on_loan(derivative: Callable[..., PyTree]) -> Callable[..., PyTree]:
        def call(*vectors: PyTree) -> PyTree:
            with loan.on(h):
                return loan.back(derivative(*(loan.out(v) for v in vectors)))

        return call

    names = ("vjp_h", "vjp_z", "vjp", "jvp_h", "jvp_z", "jvp")
    return {name: on_loan(getattr(at, name)) for name in names if getattr(at.raw, name) is not None}


class _Loan:
    """The way of arrays from ``here`` to ``there`` and back."""

    def __init__(self, here: Backend, there: Backend) -> None:
        self._here, self._there = here, there

    @contextmanager
    def on(self, h: PyTree) -> Any:
        """Within it both work on the devices of ``h``, in the order of one stream."""
        with self._here.beside(h), self._there.on_stream(self._here.stream(h)), self._there.solving():
            yield self

    def out(self, tree: PyTree) -> PyTree:
        """Arrays that are here, as the lender's."""
        if self._here is self._there:
            return tree

        def array(x: Any) -> Any:
            if not self._here.is_array(x):
                return x
            if not hasattr(x, "__dlpack__"):  # as NumPy's scalars
                x = self._here.xp.asarray(x)
            try:
                return self._there.from_dlpack(x)
            except BufferError:  # memory that may only be read
                return self._there.from_dlpack(self._here.xp.asarray(x, copy=True))

        return self._here.map(array, tree)

    def back(self, tree: PyTree) -> PyTree:
        """Arrays of the lender's, as those here."""
        if self._here is self._there:
            return tree

        def array(x: Any) -> Any:
            return self._here.from_dlpack(self._there.stop_gradient(x)) if self._there.is_array(x) else x

        return self._there.map(array, tree)
