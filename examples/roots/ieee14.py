"""The IEEE 14-bus network: a part of the American grid in 1962, and the usual small test of power flow programs.

From the power systems test case archive of the University of Washington, https://labs.ece.uw.edu/pstca/.
"""

BASE_MVA, BUSES = 100.0, 14

# From bus, to bus, resistance, reactance, charging susceptance (per unit), tap ratio of a transformer or 1.
BRANCHES = (
    (1, 2, 0.01938, 0.05917, 0.0528, 1.0),
    (1, 5, 0.05403, 0.22304, 0.0492, 1.0),
    (2, 3, 0.04699, 0.19797, 0.0438, 1.0),
    (2, 4, 0.05811, 0.17632, 0.034, 1.0),
    (2, 5, 0.05695, 0.17388, 0.0346, 1.0),
    (3, 4, 0.06701, 0.17103, 0.0128, 1.0),
    (4, 5, 0.01335, 0.04211, 0.0, 1.0),
    (4, 7, 0.0, 0.20912, 0.0, 0.978),
    (4, 9, 0.0, 0.55618, 0.0, 0.969),
    (5, 6, 0.0, 0.25202, 0.0, 0.932),
    (6, 11, 0.09498, 0.1989, 0.0, 1.0),
    (6, 12, 0.12291, 0.25581, 0.0, 1.0),
    (6, 13, 0.06615, 0.13027, 0.0, 1.0),
    (7, 8, 0.0, 0.17615, 0.0, 1.0),
    (7, 9, 0.0, 0.11001, 0.0, 1.0),
    (9, 10, 0.03181, 0.0845, 0.0, 1.0),
    (9, 14, 0.12711, 0.27038, 0.0, 1.0),
    (10, 11, 0.08205, 0.19207, 0.0, 1.0),
    (12, 13, 0.22092, 0.19988, 0.0, 1.0),
    (13, 14, 0.17093, 0.34802, 0.0, 1.0),
)

# Active and reactive power drawn at buses 1 to 14.
LOADS_MW = (0.0, 21.7, 94.2, 47.8, 7.6, 11.2, 0.0, 0.0, 29.5, 9.0, 3.5, 6.1, 13.5, 14.9)
LOADS_MVAR = (0.0, 12.7, 19.0, -3.9, 1.6, 7.5, 0.0, 0.0, 16.6, 5.8, 1.8, 1.6, 5.8, 5.0)

# By bus: active power from generators, capacitors, and voltages that generators keep (per unit). Bus 1 is the slack.
GENERATION_MW = {2: 40.0}
SHUNT_MVAR = {9: 19.0}
HELD = {1: 1.06, 2: 1.045, 3: 1.01, 6: 1.07, 8: 1.09}

# The published solution: magnitudes (per unit) and angles (degrees).
MAGNITUDES = (1.06, 1.045, 1.01, 1.019, 1.02, 1.07, 1.062, 1.09, 1.056, 1.051, 1.057, 1.055, 1.05, 1.036)
ANGLES = (0.0, -4.98, -12.72, -10.33, -8.78, -14.22, -13.37, -13.36, -14.94, -15.1, -14.79, -15.07, -15.16, -16.04)
