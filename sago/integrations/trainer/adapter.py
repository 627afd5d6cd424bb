"""Adapters to attributes of the Trainer and of accelerate, in the versions that were tested."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import Tensor

from sago.integrations import deepspeed
from sago.private import has_since, require

TESTED = "transformers 4.45 to 5.24"
ACCELERATE = "accelerate 1.15"


def engine_of(accelerator: Any, model: Any) -> Any:
    """accelerate's wrapper of the DeepSpeed engine, or None without DeepSpeed."""
    name = "deepspeed_engine_wrapped"
    if not deepspeed.is_engine(model):
        return getattr(accelerator, name) if hasattr(accelerator, name) else None
    require(accelerator, [name], "accelerate", ACCELERATE)
    wrapper = getattr(accelerator, name)
    if wrapper is None:
        raise ValueError(
            f"`accelerator.{name}` should be the wrapper of the DeepSpeed engine that is trained, because "
            "sago replaces it during the trainer's backward. Found None. Make the engine with "
            "accelerator.prepare."
        )
    return wrapper


def micro_batches(trainer: Any) -> int:
    """The number of micro-batches of the open window."""
    if hasattr(trainer, "current_gradient_accumulation_steps"):
        current: int = trainer.current_gradient_accumulation_steps
        return current
    return most_micro_batches(trainer)  # before transformers 4.54


def most_micro_batches(trainer: Any) -> int:
    """The number of micro-batches of a full window."""
    # In transformers 4.45 accelerate may have a number of its own.
    return max(trainer.args.gradient_accumulation_steps, trainer.accelerator.gradient_accumulation_steps)


def steps_next(trainer: Any) -> bool:
    """Whether the optimizer steps before the next micro-batch."""
    accelerator = trainer.accelerator
    if accelerator.sync_gradients:
        return True
    if hasattr(trainer, "get_batch_samples"):
        return False
    # transformers 4.45 also steps at the end of an epoch that is shorter than a window, but sets
    # `sync_gradients` only afterwards.
    batches = operator.length_hint(trainer.callback_handler.train_dataloader, sys.maxsize)
    short = batches <= trainer.args.gradient_accumulation_steps
    return short and accelerator.gradient_state.end_of_dataloader


def gradient_scale(accelerator: Any, like: Tensor) -> Any:
    """The scale of accelerate's GradScaler, on the device of a tensor."""
    return 1.0 if accelerator.scaler is None else accelerator.scaler.scale(torch.ones_like(like[0]))


def check_supported(trainer: Any) -> None:
    """Raises for options of the trainer with which its backward cannot be replaced."""
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "layerwise" in name or "lomo" in name:
        raise ValueError(f"Parameter `optim` should step after the backward, not in it. Found {name!r}.")
    if _context_parallel(trainer.accelerator):
        raise ValueError(
            "Parameter `parallelism_config` should be without context parallelism, because its backward must "
            "run inside its context manager. Found cp_size > 1. Set cp_size=1."
        )
    if getattr(trainer, "use_apex", False):
        raise ValueError("Parameter `half_precision_backend` should be 'auto'. Found apex.")


def _context_parallel(accelerator: Any) -> bool:
    known = has_since(accelerator, "parallelism_config", "accelerate", (1, 10), "accelerate", ACCELERATE)
    if not known or accelerator.parallelism_config is None:
        return False
    require(accelerator.parallelism_config, ["cp_enabled"], "accelerate", ACCELERATE)
    return bool(accelerator.parallelism_config.cp_enabled)


def check_one_micro_batch(trainer: Any) -> None:
    count = most_micro_batches(trainer)
    if count > 1:
        raise ValueError(
            "Parameter `one_copy` should be False with gradient accumulation, because the retain gradients "
            f"of several micro-batches need accumulators. Found True and {count} micro-batches. Set "
            "gradient_accumulation_steps=1 with a larger per_device_train_batch_size, or leave `one_copy` "
            "out."
        )
