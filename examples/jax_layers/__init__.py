"""Implicit layers in the libraries that JAX's users build with: Equinox, Flax NNX and Optimistix.

Each file is self-contained and made to be copied. ``python -m implicit_core.examples.jax_layers`` trains all of them
on a toy problem.
"""
