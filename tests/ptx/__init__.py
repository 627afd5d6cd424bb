"""Executes the PTX that Triton compiles the kernels to, without a GPU; docs/ptx.md explains how."""
