"""The paper's tables and figures with multiscale equilibrium models: Tab. 1 to 3, Fig. 2 and Fig. 3."""
