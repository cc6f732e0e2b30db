"""The test problems themselves: hand-written derivatives against differences, roots against SciPy."""

import numpy as np
import pytest
from libraries import NUMPY, flat, unflat
from problems import CASES, Case, differences


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_derivatives_match_central_differences(case: Case) -> None:
    rng = np.random.default_rng(0)
    h = unflat(flat(case.h0) + 0.1 * rng.normal(size=flat(case.h0).size), case.h0)
    v, dh = (rng.normal(size=flat(h).size) for _ in range(2))
    dz = rng.normal(size=flat(case.z).size)

    def along(t: np.ndarray) -> np.ndarray:
        return flat(case.f(NUMPY.xp, unflat(flat(h) + t * dh, h), unflat(flat(case.z) + t * dz, case.z)))

    tangent = flat(case.jvp(NUMPY.xp, h, case.z, unflat(dh, h), unflat(dz, case.z)))
    np.testing.assert_allclose(tangent, differences(along, np.zeros(1))[:, 0], atol=1e-7)
    v_h, v_z = case.vjp(NUMPY.xp, h, case.z, unflat(v, h))
    np.testing.assert_allclose(flat(v_h) @ dh + flat(v_z) @ dz, v @ tangent, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", [case for case in CASES if case.root is not None], ids=lambda case: case.name)
def test_roots_are_roots(case: Case) -> None:
    np.testing.assert_allclose(flat(case.f(NUMPY.xp, case.root, case.z)), flat(case.root), atol=1e-12)
