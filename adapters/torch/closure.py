"""The tensors that F depends on, and F as an explicit function of them.

``externals`` are, here and in all of this package, the tensors that F depends on other than h: the leaves of z, and
the closed-over tensors, such as the parameters of a module.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple

from torch import Tensor, nn

from implicit_core.arrays import H, Z
from implicit_core.backends.torch import BACKEND
from implicit_core.problem import Map

from .function_modes import ObserveInputs, Quiet, replacing
from .identity import IdentityMap, IdentitySet
from .referenced_modules import with_present_parameters
from .tensors import OnLeaves, Tensors, is_expanded, tensors
from .unchanged import Unchanged

OTHER_PARAMETER = (
    "f used another parameter when it was called again for a derivative than in the solve. If functional_call, or an "
    "optimizer that is differentiated, replaced it in the meantime, pass the module to fixed_point itself, or pass its "
    "parameters in z. Unroll(k, lam) calls f again in no backward pass"
)
ATTRIBUTE_IN_COMPILED = (
    "torch.compile fails where a compiled cell reads an attribute of a parameter that is a tensor, such as W.T: write "
    "W.t() or torch.nn.functional.linear(h, W), or use the estimator Unroll(k, lam)"
)


class Evaluation(NamedTuple, Generic[H]):
    """One evaluation of F.

    Attributes
    ----------
    value
        F(h, z).
    externals
        The tensors that F depends on other than h.
    unchanged
        Those among them that F has to find again, and did not write to.
    produced_leaves
        Returns the leaves of autograd's graph that f made itself, as another implicit layer within f does.
    watched
        Whether a tool looks at the cotangents of a backward pass: f called ``retain_grad``, or its weights compute
        per-sample gradients on the side.
    """

    value: H
    externals: Tensors
    unchanged: Unchanged
    produced_leaves: Callable[[], list[Tensor]]
    watched: bool


def hoist(f: Map[H, Z], h: H, z: Z, usable: Callable[[Tensor], bool], quiet: Quiet | None = None) -> Evaluation[H]:
    """Evaluate F, and find the tensors that it depends on.

    Closed-over tensors are found when they enter PyTorch's functions (Decision 37). Tensors that compiled or scripted
    code holds are not found. Tensors that are not ``usable`` are left out: a vmap within f makes such. ``quiet``
    gates the hooks that f registers on tensors.
    """
    with ObserveInputs(tensors(h), quiet) as observed:
        try:
            value = f(h, z)
        except AssertionError as error:
            if str(error).startswith("Guard"):
                error.add_note(ATTRIBUTE_IN_COMPILED)
            raise
    observed.collect(tensors(value))  # f may return a closed-over tensor as it is
    found = IdentitySet([*tensors(z), *observed.inputs])
    externals = tuple(x for x in found if usable(x))
    observed.unchanged.settle()
    watched = observed.keeps_gradients or any(map(is_expanded, found))
    return Evaluation(value, externals, observed.unchanged, observed.produced_leaves, watched)


def with_explicit_inputs(
    f: Map[H, Z], structure: Hashable, z: Z, known: Sequence[Tensor], externals: Sequence[Tensor]
) -> OnLeaves:
    """``f`` as a function of the leaves of h, and of tensors that replace ``externals``.

    Parameters
    ----------
    f
        F.
    structure
        The pytree structure of h.
    z
        The z with which F was evaluated.
    known
        All externals that :func:`hoist` found.
    externals
        Those among them that are to be replaced.
    """
    known_externals, in_z = IdentitySet(known), IdentitySet(tensors(z))
    parameters = [x for x in known if isinstance(x, nn.Parameter) and x not in in_z]
    if not all(isinstance(x, nn.Parameter) or x in in_z for x in known):  # functional_call may be at work
        f = with_present_parameters(f)

    def call(h_leaves: Sequence[Tensor], replacements: Sequence[Tensor]) -> Tensors:
        by_external = IdentityMap(zip(externals, replacements, strict=True))
        used: IdentitySet[Tensor] = IdentitySet()

        def replace(x: Tensor) -> Tensor:
            if isinstance(x, nn.Parameter):
                if x not in known_externals:
                    raise RuntimeError(OTHER_PARAMETER)
                used.add(x)
            return by_external.get(x, x)

        with replacing(replace):
            value = f(BACKEND.unflatten(structure, list(h_leaves)), BACKEND.map(replace, z))
        result = tuple(replace(x) for x in BACKEND.flatten(value)[0])
        if not all(x in used for x in parameters):  # tensors that are no parameters have taken their places
            raise RuntimeError(OTHER_PARAMETER)
        return result

    return call
