"""A small convolutional deep equilibrium model learns MNIST-1D, with a gradient estimator of your choice.

The model encodes a signal of 40 points, finds the fixed point h = F(h, x) of two convolutions with the encoding x
injected, and classifies the maximum of h over time. A tenth of the training set is held out: it chose the default
settings, and it chooses the epoch to keep. The test set is seen once, at the end. Run it with
``python -m implicit_core.examples.torch_mnist1d``, or from Python with ``run`` of the module ``run``.
"""
