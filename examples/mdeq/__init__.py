"""Multiscale deep equilibrium models that classify images."""
