"""Products with the matrix of kernel sums, without holding it. Derivation: ``README.md``."""
