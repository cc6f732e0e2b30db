"""The differentiable layer on tensors.

For a plain f, or ``problem(f)``, the output carries the graph of the k damped steps (:class:`Unroll`,
:class:`BPTT`), or of one F at the solver's point, whose incoming cotangent the estimator replaces. Gradients reach z
and all tensors that f closes over. The callbacks of a :class:`Problem` are differentiated only once, with respect to z
alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Generic

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from implicit_core import checks, settings
from implicit_core.arrays import H, Z
from implicit_core.backends.torch import BACKEND, unprotected
from implicit_core.estimators import BPTT, AtFixedPoint, Unroll
from implicit_core.layer import LayerOptions, Watched, solver_point, told
from implicit_core.problem import Map, Problem
from implicit_core.registry import not_compiled
from implicit_core.root_problem import RootProblem
from implicit_core.solution import Solution
from implicit_core.solvers.compacting import without_compacting

from .autograd import gradient_edges, has_tangents, in_dual_level, transforming, vector_jacobian
from .callbacks import CLOSED_OVER, through_callbacks
from .closure import hoist, with_explicit_inputs
from .compilation import leave_methods_out, never_compiled
from .exported import exported
from .function import PLAIN_FORWARD, Rule, attach
from .function_modes import Quiet
from .graph_inputs import graph_inputs
from .growth import GrowthOfCotangents
from .identity import IdentitySet
from .precision import autocasted, full_precision, with_reachable_tolerance
from .problem import AutogradProblem, problem
from .random_state import RandomState, replayed
from .referenced_modules import generators_of, trained_by, with_present_parameters
from .tensors import as_leaf, as_tensors, has_storage, tensors, views
from .transformed import transformed
from .unchanged import Unchanged

WATCHED = (
    "the cell has full backward hooks or calls retain_grad, or a tool computes per-sample gradients in it. {} would "
    "reach them with every product with the Jacobian, and not only with the gradient of the loss: use "
    "Unroll(k, lam) or BPTT(k), whose backward pass goes once through each evaluation, or OneStep(), or remove them"
)
HOOKS_IN_F = "torch.func within f does not work in a checkpoint: use Unroll(k, lam) without recompute=True"


def without_numbers(h0: object) -> bool:
    """Whether the tensors of a start are on the meta device, and have shapes alone."""
    return any(x.is_meta for x in tensors(h0))


@not_compiled
def layer(problem: Problem[H, Z], h0: H, z: Z, options: LayerOptions) -> Solution[H]:
    """The layer that :func:`implicit_core.fixed_point` calls for tensors.

    Raises
    ------
    ValueError
        If F of a Problem with callbacks closes over tensors that require a gradient, which they would not get. A
        Problem with ``linearize`` is not checked, as its value does not come from f.
    NotImplementedError
        For a derivative that is not available, which is never zero instead.
    """
    leave_methods_out()
    if BACKEND.recording():
        return exported(problem, h0, z, options)
    if without_numbers(h0):  # one evaluation shows the shapes
        options = replace(options, gradient=BPTT(1), throw=False)
    if transforming():
        options = replace(options, solver=without_compacting(options.solver))
    h0 = as_tensors(h0, z)
    with full_precision(h0):
        if problem.has_derivatives and not isinstance(problem.base, AutogradProblem):
            return through_callbacks(problem, h0, z, options)
    return _by_autograd(problem, h0, z, options)


def _by_autograd(given: Problem[H, Z], h0: H, z: Z, options: LayerOptions) -> Solution[H]:
    """The layer of a plain f, which autograd differentiates with all that it closes over (Decision 43)."""
    f = autocasted(unprotected(given.f), h0)
    autograd = problem(BACKEND.protected(f), batch_ndim=given.batch_ndim, scale=given.scale)
    autograd.jacobian = given.jacobian
    solved = given.about(autograd) if isinstance(given, RootProblem) else autograd
    gradient = with_reachable_tolerance(options.gradient, h0)
    if gradient is not options.gradient:
        options = replace(options, gradient=gradient)
    with full_precision(h0):
        if not (isinstance(gradient, AtFixedPoint) or type(gradient) in (Unroll, BPTT)):
            if torch.is_grad_enabled():
                _check_all_in_z(autograd, h0, z)
            return through_callbacks(solved, h0, z, options)
        if transforming():
            solution, autograd = transformed(solved, h0, z, options)
            options = replace(options, throw=False)
        else:
            with record_function("implicit_core.solve"):
                solution = solver_point(solved, h0, z, options)
            if options.examine is not None:
                options.examine(f, solution.value)
            if isinstance(gradient, AtFixedPoint):
                solution = told(solution, options, autograd, ())
                if torch.is_grad_enabled() or in_dual_level():
                    autograd = solved.fixed_point_form(solution.value, z, relaxed=gradient.relaxes)
                    gradient = gradient.prepared(autograd, solution.value, z)
                    solution = solution._replace(value=_at_fixed_point(autograd, solution.value, z, gradient))
                return solution
            autograd = solved.fixed_point_form(solution.value, z)
        if isinstance(gradient, (Unroll, BPTT)):
            steps = autograd
            if isinstance(gradient, Unroll) and gradient.recompute:
                steps = autograd.replace_f(_recomputed(autograd.f))
            watched = Watched(steps, gradient, _kept)
            value = _unrolled(watched.problem, solution.value, z, gradient)
            return watched.told(solution._replace(value=value), options)
        return solution


def _kept(h: H) -> H:
    """A point, where there is no graph a copy: F may reuse the memory of its last result, which h is."""
    if torch.is_grad_enabled():
        return h
    copied: H = BACKEND.map(torch.clone, h)
    return copied


def _recomputed(f: Map[H, Z]) -> Map[H, Z]:
    """F, which a backward pass evaluates again."""
    if not torch.is_grad_enabled():
        return f
    # By then a module may have other parameters, or a tensor may have been written to.
    present, trained = with_present_parameters(f), trained_by(f)
    return lambda h, z: _checkpointed(present, h, z, trained, generators_of(f, z))


def _checkpointed(f: Map[H, Z], h: H, z: Z, trained: Sequence[Tensor], generators: Sequence[torch.Generator]) -> H:
    """F by torch.utils.checkpoint, which before PyTorch 2.13 leaves its hooks on where f raises: here it does not.

    Tensors that require a gradient are arguments only to be saved, which autograd looks after.
    """
    in_z = tensors(z)
    step = _Step(f, Unchanged(in_z), generators)
    saved = [x for x in IdentitySet([*in_z, *trained]) if x.requires_grad]
    value: H = checkpoint(step.forward, h, z, *saved, use_reentrant=False)
    if step.raised is None:
        return value
    try:
        raise step.raised
    finally:
        step.raised = None  # whose traceback refers to this frame, and so to the memory of f


@never_compiled
class _Step(Generic[H, Z]):
    """An evaluation for torch.utils.checkpoint, which comes back for it in each backward pass."""

    def __init__(self, f: Map[H, Z], unchanged: Unchanged, generators: Sequence[torch.Generator]) -> None:
        self._f, self._unchanged = f, unchanged
        self._evaluated = False
        # PyTorch's own generators are the checkpoint's to restore.
        self._random = [(generator, generator.get_state()) for generator in generators]
        self.raised: BaseException | None = None
        """What f raised in the first evaluation, which then returns h."""

    def forward(self, h: H, z: Z, *_: Tensor) -> H:
        if self._evaluated:
            self._unchanged.check()
            with replayed(self._random):
                return self._f(h, z)
        self._evaluated = True
        try:
            value = self._f(h, z)
            self._unchanged.settle()
            return value
        except BaseException as error:
            if "saved tensor hooks" in str(error):
                error.add_note(HOOKS_IN_F)
            self.raised = error
            return h


def _unrolled(problem: Problem[H, Z], h: H, z: Z, gradient: Unroll | BPTT) -> H:
    """The k steps from h, with their graph."""
    # Without damping a step may be a tensor of the user's that f returned, such as z or a buffer.
    may_alias = settings.is_one(gradient.lam)
    if not (gradient.is_tested and torch.is_grad_enabled()) or transforming() or in_dual_level():
        value = gradient.value(problem, h, z)
        return BACKEND.map(torch.clone, value) if may_alias else value
    # The first step starts at a constant, where no cotangent arrives, so growth is measured from h_1 on.
    ends = GrowthOfCotangents(gradient, problem.batch_ndim, problem.scale)
    unroll = gradient if isinstance(gradient, Unroll) else gradient.unrolled
    h_1 = ends.start(unroll.steps(problem, h, z, 0, 1))
    return ends.end(unroll.steps(problem, h_1, z, 1, unroll.largest, before=h))


def _at_fixed_point(problem: Problem[H, Z], h: H, z: Z, gradient: AtFixedPoint) -> H:
    """The point h with the graph of one F, whose incoming cotangent the estimator replaces (Decision 44)."""
    h_leaves, structure = BACKEND.flatten(h)
    h_in = tuple(as_leaf(x) for x in h_leaves)
    random, quiet = RandomState(h_leaves, problem.f, z), Quiet()
    with torch.enable_grad():
        evaluation = hoist(problem.f, BACKEND.unflatten(structure, views(h_in)), z, has_storage, quiet)
    checks.like(BACKEND, "the result of f", evaluation.value, h, "h0")
    outputs = tuple(BACKEND.flatten(evaluation.value)[0])
    if has_tangents(evaluation.value):
        raise NotImplementedError(PLAIN_FORWARD)
    inputs = graph_inputs(evaluation, outputs, h_in, tensors(z))
    if inputs is None:
        return h
    explicit = with_explicit_inputs(problem.f, structure, z, evaluation.externals, inputs.tensors)
    f = random.replay(evaluation.unchanged.checked(explicit))
    edges = gradient_edges(outputs)

    watched = inputs.watched

    def vjp_h(*v: Tensor) -> Sequence[Tensor]:
        if watched:
            raise NotImplementedError(WATCHED.format(type(gradient).__name__))
        with quiet:
            return vector_jacobian(edges, h_in, v)

    rule = Rule(f, gradient, structure, len(h_in), problem.batch_ndim, vjp_h, inputs.complete, scale=problem.scale)
    value: H = BACKEND.unflatten(structure, list(attach(rule, h_leaves, outputs, inputs.tensors)))
    return value


def _check_all_in_z(problem: Problem[H, Z], h0: H, z: Z) -> None:
    """Check that F closes over no tensor that requires a gradient, as the estimator's ``vjp`` is in z alone."""
    with BACKEND.solving():
        externals = hoist(problem.f, BACKEND.map(torch.clone, h0), z, has_storage).externals
    in_z = IdentitySet(tensors(z))
    if any(x.requires_grad and x not in in_z for x in externals):
        raise ValueError(CLOSED_OVER)
