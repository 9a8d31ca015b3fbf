"""Tools to develop and inspect kernels: ahead-of-time compilation, SASS, timing, memory."""
