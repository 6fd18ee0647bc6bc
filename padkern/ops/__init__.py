"""Kernels: one folder per operation, one file per implementation."""
