"""The layer in a program that is recorded to be run elsewhere: by ``torch.export``, or by ``torch.jit.trace``."""

from dataclasses import replace

import torch
from torch.jit import is_tracing  # type: ignore[attr-defined]  # documented, but not in its __all__

from implicit_core.arrays import H, Z
from implicit_core.backends.torch import BACKEND, recorded
from implicit_core.estimators import AtFixedPoint, Estimator
from implicit_core.estimators.inexact import InexactGradientWarning
from implicit_core.layer import LayerOptions, undifferentiated
from implicit_core.problem import Map, Problem
from implicit_core.root_problem import RootProblem
from implicit_core.solution import Solution
from implicit_core.solvers.compacting import without_compacting
from implicit_core.warnings_ import warn

from .precision import autocasted, full_precision
from .tensors import tensors

TRACED = (
    "torch.jit.trace records the solve of one input, without the layer's gradient: trace within torch.no_grad(), which "
    "makes a program for inference, or use torch.export. To train, call the layer itself"
)
NEWTON = (
    "{} solves linear systems until a tolerance is met, which an exported program cannot: give the layer an "
    "eval_solver with a fixed number of steps, such as Anderson(max_steps=20)"
)
STEPS_OF_A_ROOT = (
    "{} makes steps x - α g(x) from the root that a solver found, and α takes a product with ∂g/∂x, which an exported "
    "program cannot have: export the layer with Implicit(), whose value is the solver's point, or state it as a fixed "
    "point, with an α of your own: lambda h, x: h - alpha * g(h, x)"
)
CONSTANT = (
    "the exported program has no gradient through the layer, since the rule of {} is no part of a program: to deploy a "
    "model, export it in eval mode; to train the program, give the layer Unroll(k, lam) or BPTT(k), whose steps are"
)


def warn_of_constant(gradient: Estimator) -> None:
    """Warn if an estimator's gradient is no part of the program that is recorded."""
    if torch.is_grad_enabled() and isinstance(gradient, AtFixedPoint):
        warn(CONSTANT.format(type(gradient).__name__), InexactGradientWarning)


def exported(problem: Problem[H, Z], h0: H, z: Z, options: LayerOptions) -> Solution[H]:
    """The layer, whose solve makes ``max_steps`` steps (Decision 92).

    What the estimator adds to the solver's point is a part of the program: the steps of Unroll and BPTT, with their
    gradient. Other estimators return the point itself, a constant.
    """
    solver = without_compacting(options.solver)
    if getattr(solver, "uses_jacobian", False):
        raise NotImplementedError(NEWTON.format(type(solver).__name__))
    if isinstance(problem, RootProblem) and not isinstance(options.gradient, AtFixedPoint):
        raise NotImplementedError(STEPS_OF_A_ROOT.format(type(options.gradient).__name__))
    f = autocasted(problem.f, h0)
    if is_tracing() and torch.is_grad_enabled():
        f = _without_gradients(f)
    with recorded(), full_precision(h0):
        return undifferentiated(problem.replace_f(BACKEND.protected(f)), h0, z, replace(options, solver=solver))


def _without_gradients(f: Map[H, Z]) -> Map[H, Z]:
    """F, whose first evaluation raises if its value has a gradient: in z, or in a tensor that it closes over.

    The solve makes this evaluation anyway. Another one would be a part of the program, which PyTorch would refuse: it
    compares what it recorded with a second recording, without gradients.
    """
    evaluated = False

    def call(h: H, z: Z) -> H:
        nonlocal evaluated
        if evaluated:
            return f(h, z)
        evaluated = True
        with torch.enable_grad():
            value = f(h, z)
        if any(leaf.requires_grad for leaf in tensors(value)):
            raise NotImplementedError(TRACED)
        return value

    return call
