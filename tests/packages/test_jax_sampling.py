"""Densities with a layer in NumPyro and BlackJAX: the samples and posteriors of a closed form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packages.jax_models import EXACT, LONG, close, layer, name

import implicit_core as ic

A = 0.6
DATA = np.array([1.2, 0.7, 1.9, 1.4])


def by_layer(gradient: ic.Estimator) -> Any:
    """The solution of h = A h + θ, by a solve."""
    return lambda theta: layer(gradient)(lambda h: A * h + theta, jnp.zeros_like(theta))


def closed_form(theta: Any) -> Any:
    return theta / (1 - A)


def posterior() -> tuple[float, float]:
    """Mean and deviation of θ for a standard normal prior and measurements of h with unit errors."""
    slope = 1 / (1 - A)
    variance = 1 / (1 + len(DATA) * slope**2)
    return variance * slope * DATA.sum(), variance**0.5


def log_density(response: Any, theta: Any) -> Any:
    return -0.5 * theta**2 - 0.5 * jnp.sum((response(theta) - DATA) ** 2)


@pytest.mark.parametrize("gradient", [LONG, EXACT], ids=name)
def test_numpyro(gradient: ic.Estimator) -> None:
    numpyro = pytest.importorskip("numpyro", reason="numpyro is not installed")

    def model(response: Any) -> None:
        theta = numpyro.sample("theta", numpyro.distributions.Normal(0.0, 1.0))
        numpyro.sample("y", numpyro.distributions.Normal(response(theta), 1.0), obs=jnp.asarray(DATA))

    def density(response: Any, theta: Any) -> Any:
        return numpyro.infer.util.log_density(model, (response,), {}, {"theta": theta})[0]

    def gradients(response: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda theta: density(response, theta)))(jnp.asarray(0.3))

    close(gradients(by_layer(gradient)), gradients(closed_form))

    def samples(response: Any) -> Any:
        kernel = numpyro.infer.NUTS(lambda: model(response))
        run = numpyro.infer.MCMC(kernel, num_warmup=200, num_samples=1000, progress_bar=False)
        run.run(jax.random.key(0))
        return np.asarray(run.get_samples()["theta"])

    mean, deviation = posterior()
    theta = samples(by_layer(gradient))
    assert theta.mean() == pytest.approx(mean, abs=4 * deviation / 300**0.5)
    assert theta.std() == pytest.approx(deviation, rel=0.15)

    guide = numpyro.infer.autoguide.AutoNormal(lambda: model(by_layer(gradient)))
    svi = numpyro.infer.SVI(
        lambda: model(by_layer(gradient)), guide, numpyro.optim.Adam(0.02), numpyro.infer.Trace_ELBO(10)
    )
    fitted = svi.run(jax.random.key(1), 1500, progress_bar=False).params
    assert float(fitted["theta_auto_loc"]) == pytest.approx(mean, abs=0.2 * deviation)
    assert float(fitted["theta_auto_scale"]) == pytest.approx(deviation, rel=0.2)


@pytest.mark.parametrize("gradient", [LONG, EXACT], ids=name)
@pytest.mark.parametrize("algorithm", ["hmc", "nuts"])
def test_blackjax(algorithm: str, gradient: ic.Estimator) -> None:
    blackjax = pytest.importorskip("blackjax", reason="blackjax is not installed")
    options = {"step_size": 0.2, "inverse_mass_matrix": jnp.ones(1)}
    options |= {"num_integration_steps": 5} if algorithm == "hmc" else {}

    def chain(response: Any) -> Any:
        kernel = getattr(blackjax, algorithm)(lambda theta: log_density(response, theta), **options)

        def step(state: Any, key: Any) -> Any:
            state, _ = kernel.step(key, state)
            return state, (state.position, state.logdensity)

        return jax.lax.scan(step, kernel.init(jnp.asarray(0.1)), jax.random.split(jax.random.key(0), 30))[1]

    ours, expected = (jax.jit(lambda r=r: chain(r))() for r in (by_layer(gradient), closed_form))
    assert np.ptp(expected[0]) > 0.1
    close(ours, expected, atol=1e-7)
