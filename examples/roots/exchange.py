"""Equilibrium prices of pure exchange economies with CES consumers, in NumPy, with derivatives by hand."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import implicit_core as ic

Array = NDArray[np.floating]


class Consumers(NamedTuple):
    """Tastes: the shares of the goods, (consumers, goods), and elasticities of substitution, (consumers, 1), not 1."""

    shares: Array
    elasticity: Array


class Market(NamedTuple):
    """What consumers buy at given prices: incomes (batch, consumers, 1), price indices and demands likewise."""

    prices: Array
    income: Array
    weights: Array
    demand: Array


def market(tastes: Consumers, q: Array, endowments: Array) -> Market:
    """The demands of all consumers at log prices q, (batch, goods), with endowments (batch, consumers, goods)."""
    shares, sigma = (part.astype(q.dtype) for part in tastes)
    prices = np.exp(q)[:, None, :]
    income = np.sum(prices * endowments, axis=-1, keepdims=True)
    weights = shares * prices ** (1 - sigma)
    weights = weights / np.sum(weights, axis=-1, keepdims=True)  # the parts of income that are spent on each good
    return Market(prices, income, weights, weights * income / prices)


def economy(tastes: Consumers) -> ic.RootProblem[Array, Array]:
    """g: excess demand for all goods but the last, whose market clears by Walras' law, and prices that sum to 1."""

    def g(q: Array, endowments: Array) -> Array:
        excess: Array = np.sum(market(tastes, q, endowments).demand - endowments, axis=1)
        excess[:, -1] = np.sum(np.exp(q), axis=-1) - 1
        return excess

    def jvp(q: Array, endowments: Array, dq: Array, de: Array) -> Array:
        m, sigma, dq_ = market(tastes, q, endowments), tastes.elasticity.astype(q.dtype), dq[:, None, :]
        d_income = np.sum(m.prices * (endowments * dq_ + de), axis=-1, keepdims=True)
        d_index = (1 - sigma) * np.sum(m.weights * dq_, axis=-1, keepdims=True)
        d_demand = m.demand * (d_income / m.income - sigma * dq_ - d_index)
        d_excess: Array = np.sum(d_demand - de, axis=1)
        d_excess[:, -1] = np.sum(np.exp(q) * dq, axis=-1)
        return d_excess

    def vjp(q: Array, endowments: Array, v: Array) -> tuple[Array, Array]:
        m, sigma = market(tastes, q, endowments), tastes.elasticity.astype(q.dtype)
        v_ = np.concatenate([v[:, :-1], 0 * v[:, -1:]], axis=-1)[:, None, :]
        spent = np.sum(v_ * m.demand, axis=-1, keepdims=True)
        v_income = spent * m.prices / m.income
        v_q = v_income * endowments - sigma * v_ * m.demand - (1 - sigma) * m.weights * spent
        return np.sum(v_q, axis=1) + np.exp(q) * v[:, -1:], v_income - v_

    return ic.RootProblem(g, jvp=jvp, vjp=vjp, batch_ndim=1)


def log_utility(tastes: Consumers, q: Array, endowments: Array) -> Array:
    """The logarithm of the utility that each consumer reaches by trade, (batch, consumers)."""
    shares, sigma = (part.astype(q.dtype) for part in tastes)
    income = market(tastes, q, endowments).income
    index = np.sum(shares * np.exp(q)[:, None, :] ** (1 - sigma), axis=-1, keepdims=True)
    utility: Array = np.squeeze(np.log(income) - np.log(index) / (1 - sigma), axis=-1)
    return utility


def equilibrium(tastes: Consumers, endowments: Array, rtol: float = 1e-6) -> ic.Solution[Array]:
    """The logarithms of the prices at which all markets clear, from equal prices."""
    start = np.full_like(endowments[:, 0, :], -np.log(endowments.shape[-1]))
    solver = ic.Polyalgorithm(rtol=rtol, atol=rtol)  # the start may be the root: then no relative tolerance is met
    return ic.solve(economy(tastes), start, endowments, solver=solver)


def utility_gradient(tastes: Consumers, q: Array, endowments: Array, consumer: int) -> tuple[Array, Array]:
    """The derivatives of one consumer's log utility in all endowments: at fixed prices, and by what prices do."""
    m = market(tastes, q, endowments)
    direct = np.zeros_like(endowments)
    direct[:, consumer] = (m.prices / m.income)[:, consumer]
    terms_of_trade = (m.prices * (endowments - m.demand) / m.income)[:, consumer]  # Roy's identity
    _, pullback = ic.Implicit(ic.GMRES(rtol=1e-10)).vjp(economy(tastes), q, endowments)
    return direct, pullback(terms_of_trade)
