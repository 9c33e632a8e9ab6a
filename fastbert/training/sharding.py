"""FSDP2: weights, gradients and the optimizer's state in pieces, one for each process."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin  # type: ignore[import-untyped]
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from fastbert.families import ROLES, role_of

from .errors import CommandError, first_line

if TYPE_CHECKING:
    from transformers import TrainingArguments

LAYERS = {name for (_, name), (role, _) in ROLES.items() if role == "layer"}


def wants_sharding(args: TrainingArguments) -> bool:
    """Whether --fsdp is given, or ``accelerate launch --use_fsdp``, which says so in the environment."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_sharding(args: TrainingArguments) -> None:
    """Raise CommandError where a model that is to be sharded would not be, or in another way than the flags say."""
    if not wants_sharding(args):
        return
    # The conditions are accelerate's own: elsewhere it leaves every process the whole model, and says nothing.
    kind = args.distributed_state.distributed_type if args.distributed_state is not None else DistributedType.NO
    if kind == DistributedType.NO:
        raise CommandError("--fsdp: this is one process; start several with torchrun or accelerate launch")
    if kind == DistributedType.MULTI_CPU:
        raise CommandError("--fsdp: accelerate shards a model on GPUs only; on CPUs every process has the whole of it")
    given: dict[str, Any] = args.fsdp_plugin_args or {}
    config: dict[str, Any] = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    if config.get("xla"):
        raise CommandError("--fsdp_config: xla is not supported")
    if int(given.get("fsdp_version", os.environ.get("FSDP_VERSION", 1))) != 2:
        raise CommandError(
            "--fsdp_config: version must be 2, FSDP1 is not supported (accelerate launch --fsdp_version 2)"
        )
    try:
        plugin = FullyShardedDataParallelPlugin(**given)
    except (ValueError, TypeError, KeyError) as error:
        raise CommandError(f"--fsdp_config: {first_line(error)}") from error
    if plugin.cpu_ram_efficient_loading:
        raise CommandError("--fsdp_config: cpu_ram_efficient_loading must be off, every process reads the weights")
    if plugin.activation_checkpointing:
        raise CommandError("--fsdp_config: activation_checkpointing must be off, --gradient_checkpointing does it")
    if plugin.auto_wrap_policy is not transformer_auto_wrap_policy:
        raise CommandError("--fsdp_config: auto_wrap_policy must be TRANSFORMER_BASED_WRAP, every layer is wrapped")
    if other := sorted(set(plugin.transformer_cls_names_to_wrap or ()) - LAYERS):
        raise CommandError(
            f"--fsdp_config: transformer_layer_cls_to_wrap {', '.join(other)}: layers are wrapped, and nothing else"
        )
    if config.get("state_dict_type", "FULL_STATE_DICT") != "FULL_STATE_DICT":
        raise CommandError("--fsdp_config: state_dict_type must be FULL_STATE_DICT, checkpoints are whole")
    if getattr(args, "parallelism_config", None) is not None:
        raise CommandError("--parallelism_config: not together with --fsdp")


def shard(model: Any, plugin: FullyShardedDataParallelPlugin) -> None:
    """Split every layer's weights over the processes, and the rest as one, which stays whole from forward to backward.

    accelerate, which leaves a model alone that is sharded already, would give the embeddings and the decoder groups of
    their own. BERT's decoder is tied to both the word embeddings and a bias of another module, and tied weights must
    be in one group. Besides, fused ops read weights without calling the modules whose hooks would gather them.
    """
    if isinstance(model, FSDPModule):
        return
    policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    if plugin.mixed_precision_policy is not None:  # gradients are summed, and losses are, in float32 as under DDP
        policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
    settings = {"mp_policy": policy, "offload_policy": plugin.cpu_offload}
    for layer in [module for module in model.modules() if role_of(module) == "layer"]:
        fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, **settings)
    fully_shard(model, **settings)
    plugin.auto_wrap_policy = None  # carried out; accelerate would look for classes that have other names now


def save_whole(plugin: FullyShardedDataParallelPlugin) -> None:
    """Let checkpoints be whole ones that transformers opens, not one piece for each process."""
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # else those of pieces would stay
    plugin.set_state_dict_type("FULL_STATE_DICT")
