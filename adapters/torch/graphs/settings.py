"""The settings of PyTorch that a recording depends on."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.backends import cuda, cudnn

ATTRIBUTES: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (torch.backends, ("fp32_precision",)),
    (
        cuda.matmul,
        (
            "fp32_precision",
            "allow_tf32",
            "allow_fp16_reduced_precision_reduction",
            "allow_bf16_reduced_precision_reduction",
            "allow_fp16_accumulation",
        ),
    ),
    (cudnn, ("fp32_precision", "allow_tf32", "enabled", "benchmark", "deterministic")),
    (getattr(cudnn, "conv", None), ("fp32_precision",)),
    (getattr(cudnn, "rnn", None), ("fp32_precision",)),
)
"""Not every version of PyTorch has all of them."""
FUNCTIONS: tuple[Callable[[], Hashable], ...] = (
    torch.get_float32_matmul_precision,
    torch.are_deterministic_algorithms_enabled,
    torch.is_deterministic_algorithms_warn_only_enabled,
    cuda.flash_sdp_enabled,
    cuda.mem_efficient_sdp_enabled,
    cuda.math_sdp_enabled,
    cuda.cudnn_sdp_enabled,
    cuda.fp16_bf16_reduction_math_sdp_allowed,
    cuda.preferred_blas_library,
    cuda.preferred_linalg_library,
)


def numerical_settings(device_type: str) -> Hashable:
    """The settings that choose kernels or precisions: a recording repeats what was chosen when it was made."""
    autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    attributes = tuple(_known(getattr, owner, name) for owner, names in ATTRIBUTES for name in names)
    return autocast, attributes, tuple(_known(function) for function in FUNCTIONS)


def _known(read: Callable[..., Any], *arguments: Any) -> Any:
    """A setting, or None without one: PyTorch refuses to read a precision that was set under its newer name."""
    try:
        return read(*arguments)
    except (AttributeError, RuntimeError):
        return None
