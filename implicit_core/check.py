"""Is F, or a root's g, a function that an implicit layer can be built on? One call that tells it in words."""

import math
import random
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from . import checks
from .arrays import Array, H, PyTree, State, Z
from .backend import WrittenArgumentError
from .coupling import coupling, is_rounding, random_state, repeated, separating, testable, unchecked
from .problem import BoundLinearization, Linearization, Map, Problem, as_problem, zero_tangent
from .registry import find_adapter, find_backend
from .root_problem import RootProblem
from .rounding import SIGNS
from .solution import Status
from .solve import as_solver, solve
from .solvers import Anderson, FixedPointSolver, Polyalgorithm, Solver
from .solvers.jacobian import complement, multiply
from .space import Space, signs

WIDTH = 80
"""Columns of a report."""

UNEVEN = 1e3
"""Parts of g whose sizes differ by more than this are told: a tolerance relative to ‖g‖ is loose for the small ones."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with F, or with g.

    Attributes
    ----------
    kind
        ``"random"``, ``"writes"``, ``"state"``, ``"structure"``, ``"nonfinite"``, ``"coupled"``, ``"derivatives"``,
        ``"contraction"``, or ``"units"`` of a root.
    text
        What was found, with the number that shows it.
    advice
        What to do about it.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> report = ic.check(lambda h, z: h + np.random.default_rng().normal(size=2), np.zeros(2), None)
    >>> report.findings[0].kind
    'random'
    """

    kind: str
    text: str
    advice: str


@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`check` found.

    Attributes
    ----------
    findings
        What is wrong, the most basic first. Where F is not a function of its arguments, or returns something that is
        not like h, nothing else can be measured.
    notes
        What was not tested, and why.
    batch_ndim
        The number of batch axes that was tested.
    point
        Where the derivatives were tested: ``"solution"``, or ``"h0"`` (``"x0"`` of a root) if the solve failed.
    coupling
        The largest relative effect of a sample on others; 0.0 if they are independent, None if that was not tested.
    adjoint_error
        The relative difference of ⟨u, J v⟩ and ⟨Jᵀ u, v⟩; None without both derivatives.
    difference_error
        The largest relative difference of a derivative and central differences; None without a derivative.
    spectral_radius, contraction
        The largest estimates over all samples of the spectral radius of ∂F/∂h and of ‖∂F/∂h‖₂; None if not measured.
    unevenness
        How many times larger one part of a root's g is than another, in units of ``g_scale``: the rows of ∂g/∂x, times
        the sizes of x. None if not measured.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.Problem(lambda h, z: 0.5 * h + z, vjp=lambda h, z, v: (0.5 * v, v), batch_ndim=1)
    >>> ic.check(problem, np.zeros((2, 3)), np.ones((2, 3))).ok
    True
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    batch_ndim: int
    point: str
    coupling: float | None = None
    adjoint_error: float | None = None
    difference_error: float | None = None
    spectral_radius: float | None = None
    contraction: float | None = None
    unevenness: float | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def kinds(self) -> set[str]:
        """The kinds of the findings."""
        return {finding.kind for finding in self.findings}

    def __repr__(self) -> str:
        measured = {
            "coupling": self.coupling,
            "adjoint error": self.adjoint_error,
            "difference error": self.difference_error,
            "spectral radius": self.spectral_radius,
            "contraction": self.contraction,
            "unevenness": self.unevenness,
        }
        lines = [f"check with batch_ndim={self.batch_ndim}, at the {self.point}: {'ok' if self.ok else 'findings'}"]
        for finding in self.findings:
            lines += _wrapped(f"{finding.kind}: {finding.text}", "  ") + _wrapped(f"-> {finding.advice}", "    ")
        lines += [f"  {name:<17}{value:.3g}" for name, value in measured.items() if value is not None]
        for note in self.notes:
            lines += _wrapped(f"not tested: {note}", "  ")
        return "\n".join(lines)


class _Findings:
    """What the tests have found so far: the parts of a :class:`Report`."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self.numbers: dict[str, float] = {}

    def add(self, kind: str, text: str, advice: str) -> None:
        """One more finding."""
        self.findings.append(Finding(kind, text, advice))

    def measure(self, name: str, value: float) -> None:
        """A number, of which the largest is reported."""
        self.numbers[name] = max(self.numbers.get(name, 0.0), value)

    def kinds(self) -> set[str]:
        """The kinds of the findings."""
        return {finding.kind for finding in self.findings}

    def report(self, problem: Problem[H, Z], point: str) -> Report:
        """The report, of derivatives at the named point."""
        return Report(tuple(self.findings), tuple(self.notes), problem.batch_ndim, point, **self.numbers)


def check(
    f: Problem[H, Z] | Map[H, Z],
    h0: H,
    z: Z,
    *,
    batch_ndim: int | None = None,
    solver: FixedPointSolver | Callable[[Problem[H, Z], H, Z], H] | None = None,
    seed: int = 0,
) -> Report:
    """Test whether F is what an implicit layer needs, and say in words what is not.

    F must be a function of (h, z) that returns something like h and writes to neither, its samples must be independent,
    its derivatives right, and its Jacobian a contraction for the cheap estimators. The same for the g of a root, whose
    parts should be about as large as each other, instead of contracting. The test evaluates F a few dozen
    times and solves once, so call it before training and not in a loop. Modules of PyTorch that F refers to keep their
    parameters, buffers and gradients, and the random state of PyTorch stays as it was.

    Parameters
    ----------
    f
        A :class:`Problem`, or F itself, ``f(h, z)``. For a root, ``RootProblem(g)``.
    h0
        Where to start the solve: an array or a pytree of arrays, (batch..., state...).
    z
        Inputs and parameters.
    batch_ndim
        How many first axes of every leaf of h index independent samples; for a plain F only (default 0).
    solver
        The solver whose point the derivatives are tested at: Anderson() by default, and Polyalgorithm() of a root.
    seed
        Seed of the random directions.

    Returns
    -------
    Report
        ``report.ok``, ``report.findings`` and the numbers measured. Print it.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong kind. A finding never raises. An error that F raises itself passes through.
    NotImplementedError
        Within ``jax.jit``, where no number can be read: call it before.

    Notes
    -----
    Samples are independent if cotangents of some samples give products that are exactly zero in all others. Splits of
    the batch that separate each pair of samples make sure that a single pair is found, at 2 ⌈log₂ N⌉ products. A batch
    of one sample cannot be tested.

    Examples
    --------
    >>> import numpy as np
    >>> import implicit_core as ic
    >>> problem = ic.Problem(lambda h, z: 0.5 * np.mean(h, axis=0) + z, batch_ndim=1,
    ...     vjp=lambda h, z, v: (0.0 * v + 0.5 * np.mean(v, axis=0), v))
    >>> ic.check(problem, np.zeros((4, 2)), np.ones((4, 2))).kinds()
    {'coupled'}
    """
    checks.function("f", f)
    problem = as_problem(f, batch_ndim)
    seed = checks.integer("seed", seed, 0)
    if solver is None:
        solver = Polyalgorithm() if isinstance(problem, RootProblem) else Anderson()
    solver = as_solver(solver, names=problem.names)
    symbol, start = problem.names.symbol, problem.names.start
    backend = find_backend(h0, start)
    space = problem.space(h0, start)
    checks.samples(start, space.batch_shape)
    if not all(map(backend.readable, backend.flatten((h0, z))[0])):
        raise NotImplementedError("check reads numbers, so it cannot run within jax.jit or a captured graph")
    adapter = find_adapter((h0, z))
    undisturbed: Callable[..., AbstractContextManager[list[str]]] = getattr(adapter, "undisturbed", _nothing_to_restore)
    found = _Findings()
    with backend.on_device_of(h0), backend.solving():
        with undisturbed(problem.f, h0) as changed:
            is_function = _is_function(problem, space, h0, z, found)
        if changed:
            names = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
            advice = "put the module in eval mode, or freeze its statistics"
            found.add("state", f"an evaluation of {symbol} changes {names}", advice)
        if not is_function:
            found.notes.append(f"derivatives, which such a function {symbol} has none of")
            return found.report(problem, start)
        made = problem.with_derivatives((h0, z))
        problem = _pullbacks_alone(made) if changed and made is not problem else made
        with undisturbed(problem.f, h0):
            return _at_a_point(problem, space, h0, z, solver, seed, found)


def _pullbacks_alone(problem: Problem[H, Z]) -> Problem[H, Z]:
    """The problem without a JVP: forward mode of PyTorch refuses an F that writes to the buffers of a module."""

    def linearize(h: H, z: Z) -> Linearization[H, Z]:
        return replace(problem.linearize(h, z).raw, jvp_h=None, jvp_z=None, jvp=None)

    return problem.with_function(problem.f, linearize)


def _at_a_point(
    problem: Problem[H, Z],
    space: Space,
    h0: H,
    z: Z,
    solver: FixedPointSolver,
    seed: int,
    found: _Findings,
) -> Report:
    """The tests of derivatives."""
    xp = space.xp
    solver = unchecked(solver)  # which would raise at the first coupled sample
    if isinstance(solver, Solver):
        solver = replace(
            solver, freeze=False
        )  # where samples are coupled, one that is finished goes on with the others
    solution = solve(problem, h0, z, solver=solver)
    solved = bool(xp.all(solution.status == Status.CONVERGED.value))
    h, point = (solution.value, "solution") if solved else (h0, problem.names.start)
    if not (problem.has_derivatives or problem.jacobian is not None):
        found.notes.append("derivatives and independence of samples, since the problem has no VJP or JVP")
        return found.report(problem, point)
    at = problem.linearize(h, z)
    if not bool(xp.all(xp.stack([xp.all(xp.isfinite(x)) for x in space.pack(at.value)]))):
        _, _, start, symbol, *_ = problem.names
        text = f"{symbol} is not finite at the {point}, so its derivatives cannot be compared with differences"
        found.add(
            "nonfinite", text, f"look for NaN and infinite numbers in {start} and z, and for overflow in {symbol}"
        )
        return found.report(problem, point)
    _independence(problem, space, at, found)
    _derivatives(problem, space, at, seed, found)
    if isinstance(problem, RootProblem):
        _units(problem, space, at, found)
    elif "coupled" in found.kinds():
        found.notes.append("contraction, which is defined for independent samples only")
    elif at.has("vjp_h"):
        _contraction(problem, at, found)
    return found.report(problem, point)


def _independence(problem: Problem[H, Z], space: Space, at: BoundLinearization[H, Z], found: _Findings) -> None:
    """Whether a sample has an effect on others."""
    if not space.batch_shape:
        found.notes.append("independence of samples, since batch_ndim=0 makes them one system")
        return
    if not testable(space):
        found.notes.append("independence of samples, since there is one sample or none")
        return
    size = max(float(coupling(space, at, split).size) for split in separating(space.samples))
    found.measure("coupling", size)
    if size > 0 and not is_rounding(space, *repeated(space, at.value, problem.f(at.h, at.z)), size):
        symbol = problem.names.symbol
        text = f"{symbol} couples the samples that batch_ndim={problem.batch_ndim} takes for independent ({size:.1e})"
        found.add("coupled", text, "pass batch_ndim=0, which solves and differentiates them as one system")


def _is_function(problem: Problem[H, Z], space: Space, h0: H, z: Z, found: _Findings) -> bool:
    """Whether F returns the same twice, something like h, and leaves its arguments as they were."""
    backend, (function, unknown, _, symbol, *_) = space.backend, problem.names

    def arrays(tree: Any) -> list[Any]:
        return [leaf for leaf in backend.flatten(tree)[0] if backend.is_array(leaf)]

    def is_left(before: list[Any], tree: Any) -> bool:
        return all(_same(space, a, b) for a, b in zip(before, arrays(tree), strict=True))

    h_before, z_before = ([backend.xp.asarray(leaf, copy=True) for leaf in arrays(tree)] for tree in (h0, z))
    h_copy, z_copy = (backend.map(lambda leaf: _copied(space, leaf), tree) for tree in (h0, z))
    try:
        value = (problem.f if backend.sees_writes else backend.protected(problem.f))(h_copy, z_copy)
    except WrittenArgumentError:
        found.add("writes", f"{symbol} writes to its argument {unknown}", "compute a new array instead")
        return False
    try:
        value = checks.like(backend, f"the result of {function}", value, h0, unknown)
    except (TypeError, ValueError) as error:
        found.add("structure", str(error), f"return the structure, shapes and dtypes of {unknown} from {symbol}")
        return False
    value = backend.map(lambda leaf: _copied(space, leaf), value)
    h_left, z_left = is_left(h_before, h_copy), is_left(z_before, z_copy)
    works = z_left and (h_left or backend.sees_writes)
    if not works:
        found.add("writes", f"{symbol} writes to its argument {unknown} or z", "compute a new array instead")
    elif not h_left:
        advice = f"nothing, as each evaluation is handed a copy; a new array in {symbol} saves these copies"
        found.add("writes", f"{symbol} writes to its argument {unknown}", advice)
    h_copy, z_copy = (backend.map(lambda leaf: _copied(space, leaf), tree) for tree in (h0, z))
    difference, bound = repeated(space, value, problem.f(h_copy, z_copy))
    if difference > bound:
        text = f"two evaluations of {symbol} at one point differ by {difference:.2g}"
        advice = "draw random numbers once per solve (VariationalDropout in PyTorch, a key in z in JAX)"
        found.add("random", text, advice)
        return False
    return works


def _derivatives(
    problem: Problem[H, Z], space: Space, at: BoundLinearization[H, Z], seed: int, found: _Findings
) -> None:
    """Compare the derivatives with each other, and with central differences in h and in z."""
    backend, whole = space.backend, space.backend.space(at.h, 0, "h")
    u, v = (whole.unpack(random_state(whole, seed + i)) for i in (1, 2))
    eps = space.coarsest_eps
    tolerance = 100 * eps ** (2 / 3)
    zero = zero_tangent(backend, at.z)
    leaves, structure = backend.flatten(at.z, none_is_leaf=True)
    floats = [i for i, x in enumerate(leaves) if _is_float_array(backend, x)]
    directions: dict[str, tuple[Any, Any]] = {"h": (v, zero)}
    if floats:
        zeros = backend.flatten(zero, none_is_leaf=True)[0]
        for i in floats:
            z_space = backend.space(leaves[i], 0, "z")
            zeros[i] = z_space.unpack(random_state(z_space, seed + 3 + i))
        directions["z"] = (zero_tangent(backend, at.h), backend.unflatten(structure, zeros))
    pulled: Any = None
    if at.has("vjp_h"):
        pulled = at.vjp(u) if at.has("vjp_z") else (at.vjp_h(u), None)
    for name, (dh, dz) in directions.items():
        values: dict[str, float] = {}
        scale, called = 0.0, problem.names.unknown if name == "h" else name
        try:
            if at.has("jvp_h"):
                pushed = whole.pack(at.jvp_h(dh) if name == "h" else at.jvp_z(dz))
                values["JVP"], scale = _inner(whole, whole.pack(u), pushed)
            if pulled is not None and pulled["hz".index(name)] is not None:
                values["VJP"], size = _tree_inner(backend, pulled["hz".index(name)], dh if name == "h" else dz)
                scale = max(scale, size)
        except NotImplementedError:
            continue
        if name == "h" and problem.jacobian is not None:
            pushed = space.sub(space.pack(dh), multiply(space, complement(problem, space, at.h, at.z), space.pack(dh)))
            values["jacobian"], size = _inner(whole, whole.pack(u), whole.pack(space.unpack(pushed)))
            scale = max(scale, size)
        step = _step(backend, at.h if name == "h" else [leaves[i] for i in floats], eps)
        ahead, behind = (
            whole.pack(problem.f(_moved(backend, at.h, s * step, dh), _moved(backend, at.z, s * step, dz)))
            for s in (1.0, -1.0)
        )
        central, size = _inner(whole, whole.pack(u), whole.scale(0.5 / step, whole.sub(ahead, behind)))
        rounding = _inner(whole, whole.pack(u), whole.pack(at.value))[1] * eps / step
        scale = max(scale, size)
        if "JVP" in values and "VJP" in values:
            error = abs(values["JVP"] - values["VJP"]) / scale if scale else 0.0
            found.measure("adjoint_error", error)
            if not error <= max(100 * eps, eps**0.75):
                text = f"the VJP and the JVP with respect to {called} are not adjoint: relative difference {error:.1e}"
                found.add("derivatives", text, f"compare both with the formula of {problem.names.symbol}")
        for kind, value in values.items():
            error = abs(value - central) / scale if scale else 0.0
            found.measure("difference_error", error)
            if not abs(value - central) <= tolerance * scale + 8 * rounding:
                text = f"the {kind} with respect to {called} differs from central differences by {error:.1e} (relative)"
                symbol = problem.names.symbol
                advice = f"correct it; where {symbol} has kinks or is not smooth here, the difference may be the cause"
                found.add("derivatives", text, advice)


def _contraction(problem: Problem[H, Z], at: BoundLinearization[H, Z], found: _Findings) -> None:
    from .theory import contraction, spectral_radius  # which import the estimators
    from .theory.certificate import largest

    radius = found.numbers["spectral_radius"] = largest(spectral_radius(problem, at.h, at.z))
    if at.has("jvp_h"):
        found.numbers["contraction"] = largest(contraction(problem, at.h, at.z))
    if not radius < 1:
        text = f"the spectral radius of ∂F/∂h is {radius:.3g}, so phantom gradients with many terms diverge"
        advice = "take Implicit, whose solve needs no contraction, or a smaller lam, or regularize the Jacobian"
        found.add("contraction", text, advice)


def _units(problem: RootProblem[H, Z], space: Space, at: BoundLinearization[H, Z], found: _Findings) -> None:
    """Whether one part of g is far larger than another, so that a tolerance for all means little for it."""
    if not at.has("jvp_h") or space.dimension < 2:
        return
    xp, image, x = space.xp, problem.image(at.h), space.pack(at.h)
    # An unknown may be small by chance, but not all of them.
    usual = space.norm(x) / math.sqrt(space.dimension)
    least = space.select(usual > 0, xp.minimum(usual, space.full(1.0)), space.full(1.0))
    sizes = [xp.maximum(xp.abs(a), least) for a in x]
    rows = None
    for seed in range(SIGNS):
        along = State(tuple(s * size for s, size in zip(signs(space, random.Random(seed)), sizes, strict=True)))
        pushed = [xp.abs(a) for a in image.pack(at.jvp_h(space.unpack(along)))]
        rows = pushed if rows is None else [xp.maximum(a, b) for a, b in zip(rows, pushed, strict=True)]
    assert rows is not None
    # A row that is zero is an equation without unknowns, as in padding.
    rows = [float(a) for leaf in rows for a in xp.reshape(xp.max(leaf, axis=0), (-1,)) if float(a) > 0]
    if not rows:
        return
    found.measure("unevenness", max(rows) / min(rows))
    if not found.numbers["unevenness"] <= UNEVEN:
        text = f"one part of g is {found.numbers['unevenness']:.1e} times as large as another"
        advice = "pass g_scale=, the units of each part: the tolerance is relative to the norm of all of g"
        found.add("units", text, advice)


def _step(backend: Any, tree: PyTree, eps: float) -> float:
    """A step of central differences: ε^(1/3) at the size of the numbers, at least of 1."""
    sizes = [float(backend.xp.max(backend.xp.abs(x))) for x in backend.flatten(tree)[0] if 0 not in x.shape]
    # A power of two, which rounds the points that F is evaluated at the least.
    return float(2.0 ** round(math.log2(eps ** (1 / 3) * max([1.0, *(s for s in sizes if math.isfinite(s))]))))


def _moved(backend: Any, tree: PyTree, step: float, direction: PyTree) -> PyTree:
    """``tree + step · direction``, in the dtypes of the tree; only its real floating arrays move."""
    leaves, structure = backend.flatten(tree, none_is_leaf=True)
    along = backend.flatten(direction, none_is_leaf=True)[0]
    moved = [
        x + backend.xp.astype(step * d, x.dtype) if _is_float_array(backend, x) else x
        for x, d in zip(leaves, along, strict=True)
    ]
    return backend.unflatten(structure, moved)


def _inner(space: Space, x: State, y: State) -> tuple[float, float]:
    """⟨x, y⟩, and ‖x‖ ‖y‖, as numbers."""
    return float(space.dot(x, y)[0, 0]), float((space.norm(x) * space.norm(y))[0, 0])


def _tree_inner(backend: Any, x: PyTree, y: PyTree) -> tuple[float, float]:
    """The same for pytrees with leaves that may be None or no real floating arrays."""
    pairs = zip(*(backend.flatten(tree, none_is_leaf=True)[0] for tree in (x, y)), strict=True)
    kept = [(a, b) for a, b in pairs if _is_float_array(backend, a) and backend.is_array(b)]
    if not kept:
        return 0.0, 0.0
    a, b = ([pair[i] for pair in kept] for i in (0, 1))
    space = backend.space(a, 0, "z")
    return _inner(space, space.pack(a), space.pack(b))


def _is_float_array(backend: Any, x: Any) -> bool:
    return bool(backend.is_array(x) and backend.isdtype(x.dtype, "real floating"))


def _copied(space: Space, leaf: Any) -> Any:
    return space.xp.asarray(leaf, copy=True) if space.backend.is_array(leaf) else leaf


def _same(space: Space, a: Array, b: Array) -> bool:
    equal = a == b
    if space.backend.isdtype(a.dtype, ("real floating", "complex floating")):
        equal = equal | ((a != a) & (b != b))
    return bool(space.xp.all(equal))


def _nothing_to_restore(*_: object) -> AbstractContextManager[list[str]]:
    return nullcontext([])


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")
