"""Assignments that mypy checks: each backend has the functions of the protocol. No test imports this file."""

from kernels import triton
from sago.backends import compiled, reference
from sago.backends.protocol import Backend

_compiled: Backend = compiled
_reference: Backend = reference
_triton: Backend = triton
