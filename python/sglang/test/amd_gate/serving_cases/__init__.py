"""What served models ask of each op with a Triton kernel: arguments without storage, one file per group of ops."""
