"""MK-MMD from random Fourier features. Derivation: ``README.md`` beside this file."""
