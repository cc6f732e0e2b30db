"""Arnoldi's method, for GMRES and for the spectral radius: an orthonormal basis of a Krylov space."""

from collections.abc import Callable
from typing import NamedTuple

from ..arrays import Array, History, Numbers, Operator, State
from ..space import Space
from .base import ratio


class ArnoldiStep(NamedTuple):
    """The image A v of the last basis vector, split in its part within the span of the basis and the rest.

    Attributes
    ----------
    column
        Coefficients of A v in the basis, (N, m): a column of the Hessenberg matrix down to its diagonal.
    rest, height
        What is orthogonal to the basis, and its norm, the entry below the diagonal.
    """

    column: Array
    rest: State
    height: Numbers


def arnoldi_step(
    space: Space, operator: Operator, v: State, basis: History, norm: Callable[[State], Numbers]
) -> ArnoldiStep:
    """One step of Arnoldi's method, where v is the last vector of ``basis``, whose unused rows are zero.

    With a preconditioner it is M⁻¹ times this vector, and the method is that of A M⁻¹.

    References
    ----------
    W. E. Arnoldi, The principle of minimized iterations in the solution of the matrix eigenvalue problem, Quart. Appl.
    Math. 9 (1951).
    """
    column, rest = orthogonalize(space, operator(v), basis)
    return ArnoldiStep(column, rest, norm(rest))


def orthogonalize(space: Space, x: State, basis: History) -> tuple[Array, State]:
    """The coefficients of ``x`` in a basis, (N, m), and ``x`` without its part within the span of the basis.

    Classical Gram-Schmidt, made twice: as good as modified Gram-Schmidt, and made of matrix products.
    """
    row = space.row(x)
    first = space.products(row, basis)
    row = space.combine(-first, basis, onto=row)
    second = space.products(row, basis)
    rest = space.state(space.combine(-second, basis, onto=row))
    return (first + second)[:, 0, :], rest


def unit(space: Space, x: State, norm: Numbers) -> State:
    """``x`` divided by its norm; zero where the norm is zero."""
    return space.scale(ratio(space.xp.ones_like(norm), norm, space), x)
