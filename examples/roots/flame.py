"""Adiabatic flames of hydrogen in air at chemical equilibrium, in PyTorch."""

from typing import Any

import torch
from torch import Tensor

import implicit_core as ic

SPECIES = ("H2", "O2", "H2O", "N2", "OH", "H", "O", "NO")
ATOMS = ((2, 0, 2, 0, 1, 1, 0, 0), (0, 2, 1, 0, 1, 0, 1, 1), (0, 0, 0, 2, 0, 0, 0, 1))  # H, O, N in each species
# Reactions that form the radicals: their stoichiometric numbers, negative for what is consumed.
REACTIONS = (
    (-1.0, -0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0),  # H2 + ½ O2 = H2O
    (-0.5, -0.5, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0),  # ½ H2 + ½ O2 = OH
    (-0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0),  # ½ H2 = H
    (0.0, -0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0),  # ½ O2 = O
    (0.0, -0.5, 0.0, -0.5, 0.0, 0.0, 0.0, 1.0),  # ½ O2 + ½ N2 = NO
)
# NASA polynomials of GRI-Mech 3.0, 1000 to 3500 K: a1 to a5 of the heat capacity, a6 of enthalpy, a7 of entropy.
NASA = (
    (3.3372792, -4.94024731e-05, 4.99456778e-07, -1.79566394e-10, 2.00255376e-14, -950.158922, -3.20502331),
    (3.28253784, 1.48308754e-03, -7.57966669e-07, 2.09470555e-10, -2.16717794e-14, -1088.45772, 5.45323129),
    (3.03399249, 2.17691804e-03, -1.64072518e-07, -9.7041987e-11, 1.68200992e-14, -30004.2971, 4.9667701),
    (2.92664, 1.4879768e-03, -5.68476e-07, 1.0097038e-10, -6.753351e-15, -922.7977, 5.980528),
    (3.09288767, 5.48429716e-04, 1.26505228e-07, -8.79461556e-11, 1.17412376e-14, 3858.657, 4.4766961),
    (2.50000001, -2.30842973e-11, 1.61561948e-14, -4.73515235e-18, 4.98197357e-22, 25473.6599, -0.446682914),
    (2.56942078, -8.59741137e-05, 4.19484589e-08, -1.00177799e-11, 1.22833691e-15, 29217.5791, 4.78433864),
    (3.2606056, 1.1911043e-03, -4.2917048e-07, 6.9457669e-11, -4.0336099e-15, 9920.9746, 6.3693027),
)
R = 8.314462618  # J / (mol K)
UNITS, G_UNITS = {"log_n": 1.0, "T": 1e3}, {"log_n": 1.0, "T": 1e5}  # 1 and K; mol or 1, and J
START = (0.1, 0.1, 1.0, 3.76, 0.1, 0.1, 0.1, 0.1)  # mol, at 2000 K


def enthalpy_and_gibbs(t: Tensor) -> tuple[Tensor, Tensor]:
    """H / R, in K, and G / (R T) of each species at 1 atm, (batch, species), at temperatures (batch, 1)."""
    a, powers = t.new_tensor(NASA), t ** torch.arange(5)
    h = t * (powers @ (a[:, :5] / torch.arange(1, 6)).T) + a[:, 5]
    s = a[:, 0] * torch.log(t) + powers[:, 1:] @ (a[:, 1:5] / torch.arange(1, 5)).T + a[:, 6]
    return h, h / t - s


def equilibrium(x: dict[str, Tensor], z: dict[str, Tensor]) -> dict[str, Tensor]:
    """g: three balances of atoms (mol), five laws of mass action, and the balance of enthalpy (J)."""
    n, phi, (h, gibbs) = torch.exp(x["log_n"]), z["phi"], enthalpy_and_gibbs(x["T"])
    atoms, numbers = n.new_tensor(ATOMS), n.new_tensor(REACTIONS)
    feed = torch.cat([4 * phi, 2 + 0 * phi, 7.52 + 0 * phi], dim=-1)  # of 2φ H2 + O2 + 3.76 N2
    potential = gibbs + x["log_n"] + torch.log(z["p"] / n.sum(-1, keepdim=True))
    return {
        "log_n": torch.cat([n @ atoms.T - feed, potential @ numbers.T], dim=-1),
        "T": R * (n * h).sum(-1, keepdim=True),  # the feed, elements at 298.15 K, has none
    }


def solve(z: dict[str, Tensor], rtol: float = 1e-6, **units: Any) -> ic.Solution[dict[str, Tensor]]:
    """Amounts and temperature at equivalence ratios ``z["phi"]`` and pressures ``z["p"]`` (atm), each (batch, 1)."""
    phi = z["phi"].detach()
    x0 = {"log_n": torch.zeros_like(phi) + phi.new_tensor(START).log(), "T": torch.full_like(phi, 2000.0)}
    units = units or {"scale": UNITS, "g_scale": G_UNITS}
    solver, gradient = ic.Polyalgorithm(rtol=rtol), ic.Implicit(ic.GMRES(rtol=rtol))
    return ic.root(equilibrium, x0, z, solver=solver, gradient=gradient, batch_ndim=1, **units)
