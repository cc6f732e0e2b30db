"""array-api-strict: nothing beyond the standard. What runs here runs on every conforming library."""

import array_api_strict as xp

from implicit_core.backend import Backend

BACKEND = Backend("array_api_strict", xp, (type(xp.empty(0)),))
