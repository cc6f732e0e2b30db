"""array-api-strict: nothing beyond the standard. What runs here runs on every conforming library."""

import array_api_strict as xp

from .numpy import NumPyBackend

# Its arrays wrap NumPy's, and warn as they do.
BACKEND = NumPyBackend("array_api_strict", xp, (type(xp.empty(0)),))
