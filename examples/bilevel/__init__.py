"""Hyperparameters by gradient descent: a penalty for each pixel of a digit classifier, in PyTorch and in JAX.

The model is written once, on the array API. ``python -m implicit_core.examples.bilevel`` compares the estimators.
"""
