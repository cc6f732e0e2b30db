"""The oracle of the tests in this folder agrees with the layer."""

import pytest
from packages.models import ESTIMATORS, Model, close, gradients, inputs, name, plain, squares

import implicit_core as ic


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=name)
def test_the_plain_model_has_the_gradients_of_the_layer(gradient: ic.Estimator) -> None:
    model, (x, y) = Model(gradient), inputs()
    close(gradients(squares(model(x), y), model), gradients(squares(plain(model, x), y), model))
