// Proves that the CUDA compiler and its host compiler work together; never installed.
__global__ void probe_kernel(int* out) { *out = 1; }
