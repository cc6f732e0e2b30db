"""A backend of somebody else's framework, which follows the array API and has a fused ``a x + y``."""

from typing import Any

import array_api_strict as xp

from implicit_core import Backend
from implicit_core.space import Space

LAUNCHED: list[str] = []


class FusedSpace(Space):
    """Arithmetic with the framework's fused operation."""

    def multiply_add(self, factor: Any, x: Any, y: Any) -> Any:
        LAUNCHED.append("multiply_add")
        return factor * x + y


class MyBackend(Backend):
    """Its devices have names of their own."""

    def devices(self) -> list[str]:
        return ["accelerator 0"]


BACKEND = MyBackend("my_framework", xp, (type(xp.empty(0)),), space=FusedSpace)
