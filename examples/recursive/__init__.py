"""A recursive model that solves Sudoku puzzles of 6 x 6 cells: one small network, applied to its own state.

It has the form of the tiny recursive models of A. Jolicoeur-Martineau, *Less is more: recursive reasoning with tiny
networks* (2025). Which of its recursions the gradient passes through is the estimator of its implicit layer.
"""
