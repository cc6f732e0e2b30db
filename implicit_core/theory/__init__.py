"""The paper's theorems as tools: whether a gradient is a descent direction, and how many terms an accuracy takes.

>>> from implicit_core.theory import certify, suggest
"""

from .certificate import Certificate, Condition
from .certify import certify
from .krylov import Bounds
from .power_iteration import contraction, spectral_radius
from .suggest import suggest

__all__ = ["Bounds", "Certificate", "Condition", "certify", "contraction", "spectral_radius", "suggest"]
