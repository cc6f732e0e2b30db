"""What a solve costs in evaluations and Jacobian products, counted while it runs: in NumPy, and in compiled JAX.

In JAX, an evaluation and a product are marked by two primitives that are the identity, and call the host when they are
executed. So a product counts once whether a library pushes forward, pulls back or makes a whole Jacobian (which is n
products by ``vmap``), and what a compiler removes does not count.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from implicit_core.arrays import Array


class LimitError(Exception):
    """A solve has cost too much."""


class Tally:
    """The cost of one solve so far, and of its first point at which the residual was small enough.

    ``limit`` is one of evaluations and products, and ``seconds`` one of the processor's time.

    Attributes
    ----------
    evaluations, products
        Of the residual, and with its Jacobian or its transpose.
    reached
        Evaluations and products until the first point whose residual is small enough, that evaluation included, and
        the seconds until then; None if there was none.
    point
        That point, if it is known: in NumPy only.
    """

    def __init__(self, limit: float = math.inf, seconds: float = math.inf) -> None:
        self.reset(limit, seconds)

    def reset(self, limit: float = math.inf, seconds: float = math.inf, samples: int = 1) -> None:
        """Begin again; ``samples`` solves run in step under ``vmap`` and count as one."""
        self.limit, self.seconds, self.samples = limit, seconds, samples
        self.evaluations = self.products = 0.0
        self.reached: tuple[int, int, float] | None = None
        self.point: Array | None = None
        self.own = 0.0
        self.begin, self.begin_cpu = time.perf_counter(), time.process_time()

    @property
    def units(self) -> float:
        """Evaluations plus products."""
        return self.evaluations + self.products

    def evaluated(self, excess: float, times: int = 1, point: Array | None = None) -> None:
        """Count an evaluation; the residual is small enough if ``excess`` is at most 1."""
        now = time.perf_counter()
        self.evaluations += times / self.samples
        if self.reached is None and excess <= 1:
            self.reached = round(self.evaluations), round(self.products), now - self.begin - self.own
            self.point = None if point is None else np.array(point)

    def multiplied(self, times: int = 1) -> None:
        """Count products."""
        self.products += times / self.samples

    def check(self) -> None:
        """Raise if the solve has cost too much; in NumPy only, since a compiled program cannot be left."""
        if self.units > self.limit or time.process_time() - self.begin_cpu > self.seconds:
            raise LimitError


Residual = Callable[[Array, Any], Array]


def counted_in_numpy(residual: Residual, excess: Callable[[Array, Array, Any], Array], z: Any, tally: Tally) -> Any:
    """``x -> residual(x, z)``, counted; the time of counting is not."""

    def counted(x: Array) -> Array:
        tally.check()
        value = residual(x, z)
        begin = time.perf_counter()
        tally.evaluated(float(excess(x, value, z)), point=x)
        tally.own += time.perf_counter() - begin
        return value

    return counted


def counted_in_jax(residual: Residual, excess: Callable[[Array, Array, Any], Array], tally: Tally) -> Any:
    """``(x, z) -> residual(x, z)`` and its derivatives in x, counted wherever they are executed."""
    import jax

    evaluated, multiplied = _primitives()

    @jax.custom_jvp
    def counted(x: Array, z: Any) -> Array:
        value = residual(x, z)
        return value + evaluated.bind(excess(x, value, z), tally=tally, times=1)

    @counted.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (x, z), (dx, _) = primals, tangents
        value = counted(x, z)
        tangent = jax.jvp(lambda x: residual(x, z), (x,), (dx,))[1]
        return value, multiplied.bind(tangent, value.ravel()[0], tally=tally, times=1)

    return counted


_made: list[Any] = []


def _primitives() -> Any:
    """The marks of an evaluation, which makes its excess zero, and of a product, which returns it.

    A product also takes a number of the evaluation at its point, so that it is counted after that.
    """
    if _made:
        return _made
    import jax
    import jax.numpy as jnp
    from jax.experimental import io_callback  # which a compiler does not move out of a loop
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir

    def zero(count: Callable[..., None], seen: Any, dtype: Any, tally: Tally, times: int) -> Any:
        def host(seen: Any) -> np.ndarray:
            count(tally, times, seen)
            return np.zeros((), dtype)

        return io_callback(host, jax.ShapeDtypeStruct((), dtype), seen)

    def evaluate(excess: Any, *, tally: Tally, times: int) -> Any:
        largest = jnp.max(jnp.where(jnp.isnan(excess), jnp.inf, excess))
        return jnp.broadcast_to(zero(_count_evaluation, largest, excess.dtype, tally, times), excess.shape)

    def multiply(tangent: Any, value: Any, *, tally: Tally, times: int) -> Any:
        return tangent + zero(_count_product, (tangent.ravel()[0], value.ravel()[0]), tangent.dtype, tally, times)

    for name, run in (("evaluated", evaluate), ("multiplied", multiply)):
        primitive = Primitive(name)
        primitive.def_abstract_eval(lambda x, *_, **__: x)
        primitive.def_impl(run)
        mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))

        def batched(values: Any, axes: Any, *, tally: Tally, times: int, primitive: Any = primitive) -> Any:
            front = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(values, axes, strict=True)]
            size = next(x.shape[axis] for x, axis in zip(values, axes, strict=True) if axis is not None)
            if axes[0] is None:
                front[0] = jnp.broadcast_to(front[0], (size, *front[0].shape))
            return primitive.bind(*front, tally=tally, times=times * size), 0

        batching.primitive_batchers[primitive] = batched
        _made.append(primitive)
    multiplied = _made[1]
    ad.defjvp(multiplied, lambda dx, _, value, **settings: multiplied.bind(dx, value, **settings), None)
    ad.primitive_transposes[multiplied] = lambda cotangent, _, value, **settings: (
        multiplied.bind(cotangent, value, **settings),
        None,
    )
    return _made


def _count_evaluation(tally: Tally, times: int, excess: Any) -> None:
    tally.evaluated(float(excess), times)


def _count_product(tally: Tally, times: int, _: Any) -> None:
    tally.multiplied(times)
