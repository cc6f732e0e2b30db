"""Traced programs, kept by what they compute: equal ones are one object, and are compiled once (Decision 102)."""

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, is_dataclass
from types import FunctionType, MethodType
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import jax

from implicit_core.arrays import PyTree
from implicit_core.backends.jax_internals import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    eval_jaxpr,
    jaxprs_in_params,
)
from implicit_core.records import exact

from .effects import communication_axes, has_named_axes
from .leaves import Arrays, is_differentiable

R = TypeVar("R")

KEPT = 256
"""How many compiled functions are kept; the ones used last."""
CODE = (FunctionType, MethodType, functools.partial)
OWN_RULE = f"{__package__}.batching"
"""The module that has a rule of ``vmap`` of its own."""
RULES = 3
"""How many functions with rules of their own are followed from one into another."""
TWICE = 2
"""How often a function is followed into a rule of its own, or of another one with an equal value and an equal rule."""


class Program(Generic[R]):
    """A function of arrays, traced: ``program(*arguments, closed_over)``.

    It neither runs the user's Python nor refers to arrays, because JAX keeps it with the programs that contain it.

    Attributes
    ----------
    jaxpr
        The program. Its first inputs are the arrays that the function closes over.
    constants
        How many these are. Newer versions of JAX count them as inputs like any other.
    result
        The types of the result, a pytree.
    shared
        Whether equal programs are this object, so that what is compiled for it is found again.
    """

    def __init__(self, jaxpr: Jaxpr, constants: int, result: PyTree, *, shared: bool) -> None:
        self.jaxpr, self.constants, self.result, self.shared = jaxpr, constants, result, shared
        self._structure = jax.tree.structure(result)

    def __call__(self, *inputs: PyTree) -> R:
        """The function's result."""
        result: R = compiled(_evaluation, self)(*inputs)
        return result

    def evaluate(self, *inputs: PyTree) -> R:
        """The same, operation by operation."""
        *arguments, closed_over = inputs
        values = eval_jaxpr(self.jaxpr, list(closed_over), *jax.tree.leaves(arguments))
        result: R = jax.tree.unflatten(self._structure, values)
        return result

    # Each is found by a walk through the program, and asked for in every solve.

    @functools.cached_property
    def has_named_axes(self) -> bool:
        """Whether it refers to named axes, in collectives or to read a position."""
        return has_named_axes(self.jaxpr)

    @functools.cached_property
    def has_custom_vjp(self) -> bool:
        """Whether an operation in it has a ``custom_vjp``, so that JAX can't differentiate it in forward mode."""
        return _contains_custom_vjp(self.jaxpr)

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """The named axes that it communicates over."""
        return tuple(sorted(communication_axes(self.jaxpr)))


def program(jaxpr: Jaxpr, constants: int, result: PyTree) -> Program[Any]:
    """The program of a jaxpr: one made before, if it is equal."""
    try:
        if jaxpr.effects or has_named_axes(jaxpr):
            raise _NoKeyError
        key = _Key((constants, jax.tree.structure(result), tuple(jax.tree.leaves(result)), _key(jaxpr, ())))
    except _NoKeyError:
        return Program(jaxpr, constants, result, shared=False)
    return _PROGRAMS.setdefault(key, Program(jaxpr, constants, result, shared=True))


def _evaluation(program: Program[R]) -> Callable[..., R]:
    return program.evaluate


def compiled(make: Callable[..., Callable[..., Any]], *settings: Any) -> Callable[..., Any]:
    """``make(*settings)``, which ``jax.jit`` compiles; the same object for equal settings.

    Programs that are not shared, and settings that have no hash, would be compiled at each call. There it is the
    function as it is.
    """
    if all(getattr(setting, "shared", True) and _has_hash(setting) for setting in settings):
        return _compiled(make, *settings)
    return make(*settings)


@functools.lru_cache(maxsize=KEPT)
def _compiled(make: Callable[..., Callable[..., Any]], *settings: Hashable) -> Callable[..., Any]:
    function = make(*settings)

    def call(*inputs: PyTree) -> Any:  # an object of its own: JAX drops what it compiled with it
        return function(*inputs)

    call.__name__ = call.__qualname__ = make.__name__.strip("_")
    return jax.jit(call)


def _has_hash(setting: object) -> bool:
    try:
        hash(setting)
    except TypeError:
        return False
    return True


# When two jaxprs are equal. JAX compares them by identity. The key of one holds everything that its result depends on:
# operations in their order, parameters, types and numbers.


class _NoKeyError(Exception):
    """Nothing tells whether two such programs are equal."""


class _Key:
    """A tuple that is hashed once."""

    __slots__ = ("__weakref__", "_hash", "value")

    def __init__(self, value: Hashable) -> None:
        try:
            self._hash = hash(value)
        except TypeError:
            raise _NoKeyError from None
        self.value = value

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and (self is other or (self._hash == other._hash and self.value == other.value))


_PROGRAMS: WeakValueDictionary[_Key, Program[Any]] = WeakValueDictionary()
_CLOSED: WeakKeyDictionary[ClosedJaxpr, _Key] = WeakKeyDictionary()
Rules = tuple[tuple[Hashable, Hashable], ...]
"""Functions with a rule of their own, the outer ones first: what they compute, and what their rule does."""
CUT: Rules = ((None, None),)
"""Stands for rules that are not followed."""


def _key(jaxpr: Jaxpr, rules: Rules) -> _Key:
    """The key of a jaxpr. ``rules`` are the functions whose rule this is a part of."""
    names: dict[Var, int] = {}

    def named(variables: Sequence[Var]) -> Hashable:
        for variable in variables:
            names[variable] = len(names)
        return tuple(variable.aval for variable in variables)

    def operand(x: Var | Literal) -> Hashable:
        return names[x] if isinstance(x, Var) else (x.aval, _value(x.val, rules))

    inputs = named(jaxpr.constvars), named(jaxpr.invars)
    eqns = []
    for eqn in jaxpr.eqns:
        operands = tuple(map(operand, eqn.invars))
        eqns.append((eqn.primitive, _parameters(jaxpr, eqn, rules), operands, named(eqn.outvars), eqn.ctx))
    return _Key((inputs, tuple(eqns), tuple(map(operand, jaxpr.outvars))))


def _parameters(jaxpr: Jaxpr, eqn: JaxprEqn, rules: Rules) -> Hashable:
    if eqn.primitive.name.startswith(("custom_jvp_call", "custom_vjp_call")):
        return _function_with_rule(jaxpr, eqn, rules)
    if eqn.primitive.name == "custom_vmap_call":
        rule = getattr(eqn.params["rule"], "rule", None)  # another object holds it at each call
        if getattr(rule, "__module__", None) != OWN_RULE:  # of ours, JAX keeps the object with what it traced
            return tuple((name, _value(rule if name == "rule" else x, rules)) for name, x in eqn.params.items())
    return tuple((name, _value(x, rules)) for name, x in eqn.params.items())


def _value(x: Any, rules: Rules) -> Hashable:
    """A parameter, or a constant within an operation."""
    kind = type(x)
    if isinstance(x, ClosedJaxpr):
        return _closed(x, rules)
    if isinstance(x, Jaxpr):
        return _key(x, rules)
    if isinstance(x, (tuple, list)):
        return (kind, *[_value(item, rules) for item in x])
    if isinstance(x, dict):
        return (kind, *[(name, _value(item, rules)) for name, item in x.items()])
    if isinstance(x, jax.Array):  # another one at each call, or one that would be kept as long as the program
        raise _NoKeyError
    if hasattr(x, "tobytes"):  # an array or a number of NumPy
        return (kind, x.shape, x.dtype, x.tobytes())
    if is_dataclass(x) and not isinstance(x, type) and kind.__module__.partition(".")[0] == "jax":
        return (kind, *[_value(getattr(x, field.name), rules) for field in fields(x) if field.compare])
    if isinstance(x, CODE) and "<locals>" in getattr(x, "__qualname__", "<locals>"):  # a new object at each call
        raise _NoKeyError
    return exact(x)


def _closed(x: ClosedJaxpr, rules: Rules) -> Hashable:
    key = _CLOSED.get(x)
    if key is None:
        key = _Key((_key(x.jaxpr, rules), tuple(_value(const, rules) for const in x.consts)))
        if not rules:
            _CLOSED[x] = key
    return key


def _function_with_rule(jaxpr: Jaxpr, eqn: JaxprEqn, rules: Rules) -> Hashable:
    """A function with a rule: what it computes, and what its derivative does.

    The rule is Python code, so it is traced. A rule may call its own function, and is followed to a limited depth then.
    """
    params = dict(eqn.params)
    call: ClosedJaxpr | None = params.get("call_jaxpr")
    if call is None or params.get("symbolic_zeros"):
        raise _NoKeyError
    value = _Key((eqn.primitive, _key(call.jaxpr, rules), tuple(_value(const, rules) for const in call.consts)))
    if rules is CUT:
        return value
    made = _derivative(alone(jaxpr, eqn), pulls="custom_vjp" in eqn.primitive.name)
    if any(isinstance(const, jax.Array) for const in made.consts):  # the rule closes over them, and F does not know
        raise _NoKeyError
    consts = tuple(_value(const, rules) for const in made.consts)
    function = value, _Key((_key(made.jaxpr, CUT), consts))
    if rules.count(function) == TWICE:
        return function
    if function not in rules and len(set(rules)) == RULES:
        raise _NoKeyError
    return value, _key(made.jaxpr, (*rules, function)), consts


def alone(jaxpr: Jaxpr, eqn: JaxprEqn) -> Jaxpr:
    """One operation of a jaxpr as a jaxpr of its own, whose inputs are the variables among its operands."""
    inputs = [x for x in eqn.invars if isinstance(x, Var)]
    unnamed = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    part: Jaxpr = jaxpr.replace(constvars=[], invars=inputs, outvars=eqn.outvars, eqns=[eqn], debug_info=unnamed)
    return part


def _derivative(jaxpr: Jaxpr, *, pulls: bool) -> ClosedJaxpr:
    types, outputs = _types(jaxpr.invars), _types(jaxpr.outvars)
    moving = [i for i, x in enumerate(types) if is_differentiable(x)]

    def derivative(inputs: Arrays, tangents: Arrays, cotangents: Arrays) -> Any:
        def function(varied: Arrays) -> Arrays:
            every = list(inputs)
            for i, x in zip(moving, varied, strict=True):
                every[i] = x
            return list(filter(is_differentiable, eval_jaxpr(jaxpr, [], *every)))

        at = [inputs[i] for i in moving]
        if not pulls:
            return jax.jvp(function, (at,), (tangents,))
        value, pull = jax.vjp(function, at)
        return value, pull(cotangents)

    cotangents = list(filter(is_differentiable, outputs))
    made: ClosedJaxpr = jax.make_jaxpr(derivative)(types, [types[i] for i in moving], cotangents)
    return made


def _types(variables: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]


def _contains_custom_vjp(jaxpr: Jaxpr) -> bool:
    return any(
        eqn.primitive.name.startswith("custom_vjp") or any(map(_contains_custom_vjp, jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )
