"""The AC power flow of a small network: voltages from the powers at its buses, in PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

import implicit_core as ic

from .ieee14 import BASE_MVA, BRANCHES, BUSES, GENERATION_MW, HELD, LOADS_MVAR, LOADS_MW, SHUNT_MVAR


class Voltages(NamedTuple):
    """Angles (rad) and magnitudes (per unit), (batch..., buses)."""

    angle: Tensor
    magnitude: Tensor


def per_bus(values: dict[int, float], default: float = 0.0) -> Tensor:
    """A number for each bus, numbered from 1."""
    return torch.tensor([values.get(bus, default) for bus in range(1, BUSES + 1)], dtype=torch.float64)


def admittances() -> Tensor:
    """The complex matrix from voltages to the currents that enter the network, (buses, buses)."""
    y = torch.diag(1j * per_bus(SHUNT_MVAR) / BASE_MVA)
    for start, end, r, x, b, tap in BRANCHES:
        i, j, series = start - 1, end - 1, 1 / complex(r, x)
        y[i, i] += (series + 0.5j * b) / tap**2
        y[j, j] += series + 0.5j * b
        y[i, j] -= series / tap
        y[j, i] -= series / tap
    return y


ADMITTANCES = admittances()
LOADS = torch.tensor([LOADS_MW, LOADS_MVAR], dtype=torch.float64).T
"""Active and reactive power drawn at each bus, (buses, 2)."""
SLACK, REGULATED = per_bus({1: 1.0}) > 0, per_bus(HELD) > 0
GENERATION, HELD_MAGNITUDES = per_bus(GENERATION_MW), per_bus(HELD, 1.0)


def injections(v: Voltages) -> tuple[Tensor, Tensor]:
    """Active and reactive power (per unit) that enters the network at each bus."""
    real, imaginary = v.magnitude * torch.cos(v.angle), v.magnitude * torch.sin(v.angle)
    g, b = ADMITTANCES.real.to(real.dtype), ADMITTANCES.imag.to(real.dtype)
    i_real, i_imaginary = real @ g.mT - imaginary @ b.mT, imaginary @ g.mT + real @ b.mT
    return real * i_real + imaginary * i_imaginary, imaginary * i_real - real * i_imaginary


def mismatch(v: Voltages, loads: Tensor) -> Voltages:
    """g: balances of power where angle and magnitude are unknown, and their given values where they are held."""
    active, reactive = injections(v)
    generation, held = GENERATION.to(loads.dtype), HELD_MAGNITUDES.to(loads.dtype)
    return Voltages(
        torch.where(SLACK, v.angle, active + (loads[..., 0] - generation) / BASE_MVA),
        torch.where(REGULATED, v.magnitude - held, reactive + loads[..., 1] / BASE_MVA),
    )


def solve(loads: Tensor, rtol: float = 1e-6) -> ic.Solution[Voltages]:
    """The voltages at ``loads`` (MW and Mvar, (batch, buses, 2)), from a flat start; derivatives as accurate."""
    flat = torch.zeros_like(loads[..., 0]).detach()
    solver, gradient = ic.Newton(rtol=rtol), ic.Implicit(ic.GMRES(rtol=rtol))
    return ic.root(mismatch, Voltages(flat, flat + 1), loads, solver=solver, gradient=gradient, batch_ndim=1)


def losses(v: Voltages) -> Tensor:
    """Active power that the network turns into heat, in MW, (batch)."""
    return BASE_MVA * injections(v)[0].sum(-1)
