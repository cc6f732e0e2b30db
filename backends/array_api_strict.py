"""array-api-strict: nothing beyond the standard. What runs here runs on every conforming library."""

import array_api_strict as xp

from implicit_core.backend import Backend

from .numpy import NumPyBackend


class StrictBackend(NumPyBackend):
    """Its arrays wrap NumPy's, and warn as they do."""

    # NumPy's functions do not take its arrays.
    complex = Backend.complex
    count = Backend.count
    guarded = Backend.guarded
    unsupported = Backend.unsupported
    same_dtype = Backend.same_dtype


BACKEND = StrictBackend("array_api_strict", xp, (type(xp.empty(0)),))
