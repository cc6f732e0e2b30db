"""array-api-strict: nothing beyond the standard. What runs here runs on every conforming library."""

import array_api_strict as xp

from implicit_core.backend import Backend

from .numpy import NumPyBackend


class StrictBackend(NumPyBackend):
    """Its arrays wrap NumPy's, and warn as they do."""

    count = Backend.count  # NumPy's functions do not take its arrays


BACKEND = StrictBackend("array_api_strict", xp, (type(xp.empty(0)),))
