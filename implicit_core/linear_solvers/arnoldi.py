"""Arnoldi's method: an orthonormal basis of a Krylov space."""

from typing import NamedTuple

from ..arrays import Array, History, Mask, Numbers, State
from ..backend import Known
from ..space import Space
from .base import ratio

KEPT = 0.6
"""A vector is orthogonalized again where its part outside of the span is shorter than this times its part within."""


class ArnoldiStep(NamedTuple):
    """The image A v of the last basis vector v, split in its part within the span of the basis and the rest.

    Attributes
    ----------
    column, along
        Coefficients of A v in the basis, (N, m): a column of the Hessenberg matrix down to its diagonal; and what is
        to be added to the one of v, (N, 1).
    rest, height
        What is orthogonal to the basis, and its norm, the entry below the diagonal.
    """

    column: Array
    along: Numbers
    rest: State
    height: Numbers


def arnoldi_step(space: Space, image: State, v: State, basis: History, active: Mask, *, selective: bool) -> ArnoldiStep:
    """One step of Arnoldi's method.

    Parameters
    ----------
    space
        The space of states.
    image, v
        A v, or A M⁻¹ v with a preconditioner, and the last vector of the basis.
    basis
        The basis, whose unused rows are zero.
    active
        The samples that the result is used in.
    selective
        Whether the second pass of Gram-Schmidt is made only where it is needed, which an eager loop finds out by
        reading a number.

    References
    ----------
    W. E. Arnoldi, The principle of minimized iterations in the solution of the matrix eigenvalue problem, Quart. Appl.
    Math. 9 (1951).
    J. W. Daniel, W. B. Gragg, L. Kaufman and G. W. Stewart, Reorthogonalization and stable algorithms for updating the
    Gram-Schmidt QR factorization, Math. Comp. 30 (1976).
    """
    xp = space.xp
    # A = I - J: most of an image is along v. It would leave so large rounding errors that every step needs two passes.
    along = space.dot(v, image)
    column, rest = project(space, space.axpy(-along, v, image), basis)
    height = space.norm(rest)

    def again(carry: _Projected, masks: tuple[Known, ...]) -> _Projected:
        more, rest = project(space, carry.rest, basis, masks[0])
        return _Projected(carry.column + more, rest, space.norm(rest), carry.lost)

    within = xp.linalg.vector_norm(column, axis=-1, keepdims=True)
    projected = _Projected(column, rest, height, active & (height < KEPT * within))
    if selective:
        projected = space.backend.while_loop(lambda c: (c.lost,), again, projected, 1)
    else:
        projected = again(projected, (True,))
    return ArnoldiStep(projected.column, along, projected.rest, projected.height)


class _Projected(NamedTuple):
    column: Array
    rest: State
    height: Numbers
    lost: Mask


def project(space: Space, x: State, basis: History, mask: Known = True) -> tuple[Array, State]:
    """The coefficients of ``x`` in a basis, (N, m), and ``x`` without its part within the span; once.

    In samples without ``mask`` the coefficients are zero.
    """
    row = space.row(x)
    weights = space.products(row, basis)
    if not isinstance(mask, bool):
        weights = space.xp.where(mask[:, :, None], weights, space.xp.zeros_like(weights))
    return weights[:, 0, :], space.state(space.combine(-weights, basis, onto=row))


def orthogonalize(space: Space, x: State, basis: History) -> tuple[Array, State]:
    """The coefficients of ``x`` in a basis, (N, m), and ``x`` without its part within the span of the basis.

    Classical Gram-Schmidt, made twice: as good as modified Gram-Schmidt, and made of matrix products.
    """
    first, x = project(space, x, basis)
    second, rest = project(space, x, basis)
    return first + second, rest


def unit(space: Space, x: State, norm: Numbers) -> State:
    """``x`` divided by its norm; zero where the norm is zero."""
    return space.scale(ratio(space.xp.ones_like(norm), norm, space), x)
