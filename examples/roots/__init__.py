"""Equations g(x, z) = 0 of four fields, solved and differentiated: the pages under "Examples" explain them."""
