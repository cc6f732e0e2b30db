"""array-api-strict: nothing beyond the standard. What runs here runs on every conforming library."""

import array_api_strict as xp

from implicit_core.backend import Backend

from .numpy import NumPyBackend


class StrictBackend(NumPyBackend):
    """NumPy's, where its arrays' own functions don't reach."""

    copy = Backend.copy
    count = Backend.count


# Its arrays wrap NumPy's, and warn as they do.
BACKEND = StrictBackend("array_api_strict", xp, (type(xp.empty(0)),))
