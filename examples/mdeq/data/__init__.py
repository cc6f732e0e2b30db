"""Images: the digits of scikit-learn, Fashion-MNIST and CIFAR-10 in memory, and ImageNet in files (``imagenet``).

Pixels are uint8 in 0..255, or float32 in [0, 1]. Change them by :func:`augment` first, and then by :func:`normalized`.
"""

from .images import CLASSES, Images
from .pixels import augment, normalized
from .sets import NAMES, Data, load

__all__ = ["CLASSES", "NAMES", "Data", "Images", "augment", "load", "normalized"]
