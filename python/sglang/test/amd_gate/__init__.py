"""What can be known of the Triton kernels on AMD without an AMD GPU: that they compile, and what they then need."""
