"""What a package of somebody else's would hold: a backend, a solver, an estimator, each in one file."""
