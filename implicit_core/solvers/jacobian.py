"""A Jacobian that the user gives as a matrix: dense in every framework, or a sparse array of SciPy with NumPy.

Inside a solve a dense one is an array (N, n, n) of states, in their units and in the order of their numbers. A sparse
one is a ``scipy.sparse`` array in CSC format.
"""

import copy
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import checks
from ..arrays import Array, Mask, Matrices, Operator, PyTree, State
from ..backend import Known
from ..linear_operators import is_sparse, require_real
from ..preconditioner import AtPoint
from ..problem import Problem
from ..registry import find_backend
from ..space import Space
from . import dense

Matrix = Any
"""A dense matrix for each sample, (N, n, n), or a sparse one."""
Product = Callable[[PyTree], PyTree]
"""A linear map of pytrees."""

EXACT = 1e-3
"""The largest entry of A A⁻¹ - I for which A⁻¹ is an inverse, and not the least squares of a singular A."""


def on_states(given: Matrix, space: Space, down: Array | None) -> Matrix:
    """The matrix that a user's ``jacobian(h, z)`` returns, as one on states.

    Parameters
    ----------
    given
        (batch..., n, n), or (batch..., state..., state...), for n numbers in a sample; or sparse, (n, n). Of several
        leaves also a pytree like h of pytrees like h, whose leaf at (i, j) is the derivative of leaf i of F in leaf j
        of h, (batch..., state_i..., state_j...), as ``jax.jacobian`` and ``torch.func.jacrev`` return it.
    space
        The space of states.
    down
        What its rows are multiplied by, (N, n); None for one. Of a map of states it is one over the units.

    Raises
    ------
    TypeError, ValueError
        If it has another shape, or is an array of another framework.
    """
    n, backend, xp = space.dimension, space.backend, space.xp
    batch, across = tuple(space.batch_shape), inverse_units(space)
    if is_sparse(given):
        if backend.name != "numpy" or batch:
            raise TypeError(
                "a sparse result of jacobian is for NumPy, and for one system (batch_ndim=0): return an array "
                f"{(*batch, n, n)}"
            )
        if tuple(given.shape) != (n, n):
            raise ValueError(f"the result of jacobian must have the shape {(n, n)}, got {tuple(given.shape)}")
        require_real("the result of jacobian", given)
        matrix = given.tocsc().astype(space.dtype)
        if down is not None:
            matrix.data = matrix.data * down[0, matrix.indices]
        if across is not None:
            matrix.data = matrix.data / xp.repeat(across[0, :], matrix.indptr[1:] - matrix.indptr[:-1])
        return matrix
    blocks = _blocks(given, space)
    if blocks is None and not backend.is_array(given):
        raise TypeError(
            f"jacobian must return an array of {backend.name}, a pytree of blocks, one for each pair of leaves of "
            f"{space.name}, or with NumPy a sparse array of SciPy; got {type(given).__name__}{_advice(given)}"
        )
    made = _joined_blocks(blocks, space) if blocks is not None else _one_block(given, space)
    made = made if made.dtype == space.dtype else xp.astype(made, space.dtype)
    order = space.order_of_numbers()
    if order is not None:
        made = xp.take(xp.take(made, order, axis=1), order, axis=2)
    made = made if down is None else made * down[:, :, None]
    return made if across is None else made / across[:, None, :]


def _one_block(given: Array, space: Space) -> Array:
    """The whole matrix, (N, n, n), from an array."""
    n, batch = space.dimension, tuple(space.batch_shape)
    _check_block("the result of jacobian", given, space)
    state = tuple(space.shapes[0][len(batch) :]) if len(space.shapes) == 1 else (n,)
    if tuple(given.shape) not in ((*batch, n, n), (*batch, *state, *state)):
        raise ValueError(f"the result of jacobian must have the shape {(*batch, n, n)}, got {tuple(given.shape)}")
    return space.xp.reshape(given, (space.samples, n, n))


def _check_block(name: str, block: Any, space: Space) -> None:
    checks.supported_leaf(space.backend, name, block)
    require_real(name, block)


def _blocks(given: Any, space: Space) -> list[list[Any]] | None:
    """Rows of blocks, if ``given`` is a pytree like h of pytrees like h that is no array; else None."""
    backend, m = space.backend, len(space.shapes)
    if backend.is_array(given):
        return None
    row = backend.unflatten(space.structure, [space.like] * m)
    leaves, structure = backend.flatten(checks.structured(backend, given, row))
    if structure != backend.flatten(row)[1] or not all(map(backend.is_array, leaves)):
        return None
    return [leaves[i * m : i * m + m] for i in range(m)]


def _joined_blocks(blocks: list[list[Any]], space: Space) -> Array:
    """The whole matrix, (N, n, n), from its blocks."""
    xp, batch, widest = space.xp, tuple(space.batch_shape), space.dtype
    states = [tuple(shape[len(batch) :]) for shape in space.shapes]
    rows = []
    for i, row in enumerate(blocks):
        parts = []
        for j, block in enumerate(row):
            name = f"the block ({i}, {j}) of the result of jacobian"
            _check_block(name, block, space)
            shape = (*batch, *states[i], *states[j])
            if tuple(block.shape) != shape:
                raise ValueError(f"{name} must have the shape {shape}, got {tuple(block.shape)}")
            block = xp.reshape(block, (space.samples, math.prod(states[i]), math.prod(states[j])))
            parts.append(block if block.dtype == widest else xp.astype(block, widest))
        rows.append(xp.concat(parts, axis=2))
    return xp.concat(rows, axis=1)


def _advice(given: object) -> str:
    """What to do about a matrix of another kind, as the end of a sentence."""
    dense = next((name for name in ("to_dense", "todense") if hasattr(given, name)), None)
    if hasattr(given, "matvec"):
        return ": give its products, as vjp and jvp of the problem"
    return "" if dense is None else f": write {dense}()"


def inverse_units(space: Space) -> Array | None:
    """One over the units of every number, (N, n); None where there are none."""
    return rows_of(space, space.backend.map(space.xp.ones_like, space.like)) if space.has_units else None


def rows_of(space: Space, tree: PyTree) -> Array:
    """The state of a pytree, (N, n)."""
    return dense.joined(space, space.pack(tree))[:, 0, :]


def complement(problem: Problem[Any, Any], space: Space, h: PyTree, z: PyTree) -> Matrix:
    """I - ∂F/∂h on states, for a problem with a Jacobian. For the F(x) = x - α g(x) of a root it is α ∂g/∂x."""
    if problem.row_factors is not None:
        return on_states(evaluated(problem, space, h, z), space, rows_of(space, problem.row_factors))
    return complement_of(evaluated(problem, space, h, z), space)


def complement_of(given: Matrix, space: Space) -> Matrix:
    """I - ∂F/∂h on states, for a ∂F/∂h as :func:`on_states` takes it."""
    matrix = on_states(given, space, inverse_units(space))
    if is_sparse(matrix):
        return (identity_like(matrix) - matrix).tocsc()
    return space.eye(space.dimension)[None, :, :] - matrix


def products(problem: Problem[Any, Any], h: PyTree, z: PyTree) -> tuple[Product, Product]:
    """Products with the problem's Jacobian, and with its transpose, as functions of pytrees shaped as h."""
    space = find_backend(h, "h").space(h, problem.batch_ndim, "h")
    operator = MatrixOperator(space, lambda: on_states(evaluated(problem, space, h, z), space, None))

    def product(v: PyTree, *, transposed: bool = False) -> PyTree:
        return space.unpack(multiply(space, operator.matrix, space.pack(v), transposed=transposed))

    return product, partial(product, transposed=True)


def evaluated(problem: Problem[Any, Any], space: Space, h: PyTree, z: PyTree) -> Matrix:
    """What the user's function returns."""
    assert problem.jacobian is not None
    return space.backend.guarded(problem.jacobian, "jacobian", "h")(h, z)


@dataclass(frozen=True)
class LinearizedOperator:
    """Products by a linearization.

    Attributes
    ----------
    product
        A v for a state v.
    matrix
        Computes A on states, (N, n, n), by one call; None where that takes n products.
    """

    product: Operator
    matrix: Callable[[], Matrices | None]

    def __call__(self, x: State) -> State:
        """The product with a state."""
        return self.product(x)


class MatrixOperator:
    """Products with a Jacobian that the user gives, and the matrix.

    Parameters
    ----------
    space
        The space of states.
    make
        Computes the matrix: when it is needed first, or at once in a program that is traced.
    """

    def __init__(self, space: Space, make: Callable[[], Matrix]) -> None:
        self._space, self._make = space, make
        self._made: Matrix = None
        # A loop within a traced program must not be what the matrix is made in: it is used outside too.
        if not space.backend.readable(space.full(0.0)):
            self._made = make()

    @property
    def matrix(self) -> Matrix:
        """The matrix, on states."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def __call__(self, x: State) -> State:
        """The product with a state."""
        return multiply(self._space, self.matrix, x)


def multiply(space: Space, matrix: Matrix, x: State, *, transposed: bool = False) -> State:
    """A x, or Aᵀ x."""
    if is_sparse(matrix):
        return _split(space, (matrix.T if transposed else matrix) @ _joined(space, x))
    return dense.multiply(space, matrix if transposed else space.xp.matrix_transpose(matrix), x)


def _joined(space: Space, x: State) -> Array:
    """The state of the only sample, (n,)."""
    return dense.joined(space, x)[0, 0, :]


def _split(space: Space, x: Array) -> State:
    typed: Any = x[None, None, :]
    return dense.split(space, typed)


@dataclass(frozen=True, repr=False)
class Inverse(AtPoint):
    """A⁻¹ of a dense A; I in samples in which A is singular.

    Attributes
    ----------
    transposed
        A⁻ᵀ, (N, n, n), which a state as a row is multiplied by.
    """

    transposed: Matrices

    def solve(self, space: Space, x: State, *, transposed: bool = False) -> State:
        """See :class:`AtPoint`. The batch of x may have more axes, the first ones."""
        matrix: Any = space.xp.matrix_transpose(self.transposed) if transposed else self.transposed
        if space.samples == matrix.shape[0]:
            return dense.multiply(space, matrix, x)
        row = space.xp.reshape(dense.joined(space, x), (-1, *matrix.shape[:1], 1, matrix.shape[1]))
        return dense.split(space, space.xp.reshape(row @ matrix, (space.samples, 1, matrix.shape[1])))


@dataclass(frozen=True, repr=False)
class SparseFactors(AtPoint):
    """The LU factorization of a sparse A by SuperLU.

    Attributes
    ----------
    lu
        What ``scipy.sparse.linalg.splu`` returns.
    """

    lu: Any

    def solve(self, space: Space, x: State, *, transposed: bool = False) -> State:
        """See :class:`AtPoint`."""
        return _split(space, self.lu.solve(_joined(space, x), trans="T" if transposed else "N"))


def factorized(space: Space, matrix: Matrix) -> Inverse | SparseFactors:
    """The factorization of a matrix on states, as a preconditioner: no product with it is lost in a null space."""
    if is_sparse(matrix):
        return factors_of_sparse(space, matrix)
    inverse, singular = _inverse_and_singular(space, without_nan(space, space.xp.matrix_transpose(matrix)))
    return Inverse(space.xp.where(singular[:, :, None], space.eye(space.dimension)[None, :, :], inverse))


def transposed_of(space: Space, operator: Operator, where: Mask) -> Matrices:
    """Aᵀ, (N, n, n), of the Jacobian that the user gives, or that one call computes; else by n products.

    By products also in the samples of ``where`` in which what is computed is not finite: a product may be, as beside a
    ``where`` of F that leaves out a NaN.
    """
    matrix: Matrix = None
    if isinstance(operator, MatrixOperator) and not is_sparse(operator.matrix):
        matrix = operator.matrix
    elif isinstance(operator, LinearizedOperator):
        matrix = operator.matrix()
    if matrix is None or not space.dimension:
        return dense.transposed_matrix(space, operator)
    transposed: Matrices = space.xp.matrix_transpose(matrix)
    if not isinstance(operator, LinearizedOperator):
        return transposed
    finite = space.xp.all(space.xp.isfinite(transposed), axis=(1, 2))[:, None]
    return dense.renewed(space, lambda: dense.transposed_matrix(space, operator), transposed, where & ~finite)


def inverse_transposed(space: Space, transposed: Matrices) -> Matrices:
    """A⁻ᵀ from Aᵀ, by least squares where A is singular."""
    xp: Any = space.xp
    transposed = without_nan(space, transposed)
    inverse, singular = _inverse_and_singular(space, transposed)

    def by_least_squares(carry: tuple[Matrices, Mask], _: tuple[Known, ...]) -> tuple[Matrices, Mask]:
        return xp.linalg.pinv(carry[0]), carry[1]

    # The matrix itself is carried: what is the same in every step XLA would compute before the loop, always.
    least, _ = space.backend.while_loop(lambda carry: (carry[1],), by_least_squares, (transposed, singular), 1)
    made: Matrices = space.xp.where(singular[:, :, None], least, inverse)
    return made


def without_nan(space: Space, numbers: Any) -> Any:
    """An array with zeros in place of numbers that are not finite."""
    return space.xp.where(space.xp.isfinite(numbers), numbers, space.xp.zeros_like(numbers))


def _inverse_and_singular(space: Space, transposed: Matrices) -> tuple[Matrices, Mask]:
    """A⁻ᵀ from Aᵀ, and the samples (N, 1) in which there is none."""
    xp: Any = space.xp
    if not space.dimension:  # of which there is no largest entry
        return transposed, ~space.all_samples()
    inverse = dense.safely(space, xp.linalg.inv, transposed)
    defects = transposed @ inverse - space.eye(space.dimension)[None, :, :]
    defect = space.largest_of(xp.reshape(defects, (space.samples, space.dimension**2)))
    return inverse, ~(defect <= EXACT)  # true of NaN


def factors_of_sparse(space: Space, matrix: Matrix) -> SparseFactors:
    """The factorization of a sparse matrix, to which √ε of its largest entry times I is added if it is singular."""
    linalg = importlib.import_module("scipy.sparse.linalg")  # SciPy made the matrix
    finite = copy.copy(matrix)
    finite.data = without_nan(space, finite.data)
    try:
        return SparseFactors(linalg.splu(finite))
    except RuntimeError:  # exactly singular
        largest = float(abs(finite.data).max()) if finite.nnz else 0.0
        return SparseFactors(linalg.splu((finite + space.eps**0.5 * (largest or 1.0) * identity_like(finite)).tocsc()))


def identity_like(matrix: Matrix) -> Any:
    """The identity, sparse."""
    sparse = importlib.import_module("scipy.sparse")
    return sparse.eye_array(matrix.shape[0], dtype=matrix.dtype, format="csc")
