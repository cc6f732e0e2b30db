"""The rungs of the ladder: which recursions are made, and which of them the gradient passes through."""

from implicit_core.examples.recursive.loops import Loop as Rung
from implicit_core.examples.recursive.loops import loop


def rungs(recursions: int) -> dict[str, Rung]:
    """All rungs, for T ``recursions`` a step, at least 3; see :func:`implicit_core.examples.recursive.loops.loop`.

    The value of each is the state after T recursions, except ``unroll-5-0.5``: T - 2 and then five steps of half the
    length, which move as far as T + 1/2 recursions and cost T + 3.
    """
    settings = {
        "hrm": ("hrm",),
        "one-step": ("one-step",),
        "trm": ("trm",),
        "neumann-3-1": ("neumann", 3, 1.0),
        "neumann-5-0.5": ("neumann", 5, 0.5),
        "exact": ("implicit",),
        "switching": ("switching",),
        "unroll-2-1": ("unroll", 2, 1.0),
        "unroll-5-0.5": ("unroll", 5, 0.5),
        "full": ("full",),
    }
    return {name: loop(gradient, recursions, *numbers) for name, (gradient, *numbers) in settings.items()}
