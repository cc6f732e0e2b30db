"""JAX on a GPU: the same numbers as on the processor, and nothing copied to the host on the way."""

from typing import Any

import jax
import numpy as np
import pytest
from libraries import JAX
from problems import layer

import implicit_core as ic


def gpu() -> Any:
    """The first GPU that JAX finds, if any."""
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        return None


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu() is None, reason="JAX found no GPU")]
SOLVERS = [ic.FixedPointIteration(), ic.Anderson(), ic.Anderson(check_every=4), ic.Broyden(), ic.NewtonKrylov()]
ESTIMATORS = [ic.OneStep(), ic.Neumann(4, 0.5), ic.Unroll(3, 0.5), ic.Implicit(ic.GMRES(rtol=1e-10))]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_values_and_gradients_equal_the_results_on_the_cpu(solver: ic.Solver, estimator: ic.Estimator) -> None:
    case = layer()

    def loss(z: Any, h0: Any) -> Any:
        solution = ic.fixed_point(
            lambda h, z: case.f(JAX.xp, h, z), h0, z, solver=solver, gradient=estimator, batch_ndim=1
        )
        return (solution.value**2).sum(), solution

    found = []
    for device in (jax.devices("cpu")[0], gpu()):
        h0, z = jax.device_put((case.h0, case.z), device)
        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        step(z, h0)
        with jax.transfer_guard_device_to_host("disallow"):
            (value, solution), gradient = jax.block_until_ready(step(z, h0))
        assert solution.value.devices() == {device}
        found.append(jax.tree.map(np.asarray, (value, solution.value, solution.status, gradient)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7), *found)
