"""Classes with the names, constructors and calls of other libraries, on padkern's kernels."""
