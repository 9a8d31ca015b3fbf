"""Tools to develop and inspect kernels: ahead-of-time compilation, SASS, memory traffic, timing."""
