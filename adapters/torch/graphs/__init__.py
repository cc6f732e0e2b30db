"""Solves recorded as CUDA graphs, and replayed."""

from .solver import CUDAGraphs, GraphFallbackWarning

__all__ = ["CUDAGraphs", "GraphFallbackWarning"]
