"""A multiscale deep equilibrium model that classifies images, trained as in the paper on phantom gradients."""
