"""The gradient ladder: recursive models trained with every gradient, from one step to all recursions.

A recursive model makes T recursions a step of supervision; the estimator of its implicit layer says through which of
them the gradient passes. All runs of a seed start at the same parameters and see the same batches.
"""

from .command import main

__all__ = ["main"]
