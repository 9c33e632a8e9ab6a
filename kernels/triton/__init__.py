"""Triton kernels, one file an op: `<op>_fwd` and `<op>_bwd` launch them. Imported late, as fastbert.kernels."""

from fastbert.kernels import interpreter

interpreter.install()
