"""One small module a framework, each with its ``BACKEND``; found through :mod:`implicit_core.registry`."""
