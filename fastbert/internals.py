"""What fastbert uses from inside PyTorch and transformers, which promise to keep none of it.

All such imports are here, so that a release that moves one is met by one change, and before that by an error that says
what is missing where. Attributes of modules and configurations (`_forward_hooks`, `_modules`, `_parameters`,
`_attn_implementation`), which extensions of both libraries live by, are used where they are needed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import operator
from typing import Any

from torch.autograd import forward_ad

# The releases that the tests have run with.
TESTED = {"torch": "2.11 to 2.13", "transformers": "5.17 to 5.23"}

# What it is called here: the module that it is imported with, and its path below that.
_PLACES = {
    # A context below PyTorch's autograd, where an op costs a few microseconds less (ops/leaf.py).
    "below_autograd": ("torch", "_C._AutoDispatchBelowAutograd"),
    # How many modes follow the calls of ops (ops/leaf.py).
    "dispatch_modes": ("torch", "_C._len_torch_dispatch_stack"),
    # What torch.jit.trace records into, or None (ops/leaf.py).
    "tracing": ("torch", "_C._get_tracing_state"),
    # Whether the profiler is recording (ops/leaf.py).
    "profiling": ("torch", "_C._autograd._profiler_enabled"),
    # The tensors in a fake kernel's arguments, lists included (ops/leaf.py).
    "tree_leaves": ("torch.utils._pytree", "tree_leaves"),
    # A condition that the device looks at, without making the host wait (packing.py).
    "assert_async": ("torch", "_assert_async"),
    # Whether a torch.func transform is running, under which the ops cannot (guards.py, ops/leaf.py).
    "func_transform": ("torch", "_C._functorch.peek_interpreter_stack"),
    # Hooks on every module, which speak against the fast path (guards.py).
    "global_forward_hooks": ("torch.nn.modules.module", "_global_forward_hooks"),
    "global_forward_pre_hooks": ("torch.nn.modules.module", "_global_forward_pre_hooks"),
    "global_backward_hooks": ("torch.nn.modules.module", "_global_backward_hooks"),
    "global_backward_pre_hooks": ("torch.nn.modules.module", "_global_backward_pre_hooks"),
    # What the call that runs now records of its modules' outputs (guards.py).
    "active_collector": ("transformers.utils.output_capturing", "_active_collector"),
}


def forward_mode() -> bool:
    """Whether forward-mode differentiation is running (torch.autograd.forward_ad; guards.py, dispatch.py)."""
    return forward_ad._current_level >= 0


def __getattr__(name: str) -> Any:
    """Looks a name up when it is asked for: the ops work without transformers.

    Raises ImportError, naming versions, where the installed release does not have it.
    """
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, path = _PLACES[name]
    try:
        return operator.attrgetter(path)(importlib.import_module(module))
    except (AttributeError, ModuleNotFoundError) as error:
        package = module.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise
        raise ImportError(
            f"fastbert uses {module}.{path}, which {package} {importlib.metadata.version(package)} does not have; "
            f"it is tested with {package} {TESTED[package]}"
        ) from error
