"""What every implementation of linear attention computes, once arguments are checked and features are taken."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Scan:
    """``S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T`` and ``out_t = scale q_t S_t``; every field is checked.

    q and k have their feature map applied. q, k and v are 0 and ``log_decay`` is 0 at padding, so that nobody has to
    ask which tokens are real. A query head reads the state of key head ``h // (heads / kv_heads)``.

    out_dtype: the type of the output.
    log_decay: 0 or less, -inf forgets everything before the token; its last dimension is 1, or a value per feature.
    starts: True at the first token of every packed document but the first; the state is emptied before it.
    state: before the first token; zeros if None.
    causal: without it every row reads the state after the last token of its document, and there is no decay.
    chunk: tokens that an implementation takes at a time; the result does not depend on it.
    feature: the feature map that was applied.
    """

    q: Float[Tensor, "batch heads length features"]
    k: Float[Tensor, "batch kv_heads length features"]
    v: Float[Tensor, "batch kv_heads length value_dim"]
    scale: float
    out_dtype: torch.dtype
    log_decay: Float[Tensor, "one_or_batch kv_heads length one_or_features"] | None
    starts: Bool[Tensor, "batch length"] | None
    state: Float[Tensor, "batch kv_heads features value_dim"] | None
    causal: bool
    chunk: int
    feature: str

    @property
    def accumulator(self) -> torch.dtype:
        """The type of states, decays and sums: fp32, or fp64 for fp64 inputs."""
        return torch.promote_types(self.v.dtype, torch.float32)

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[1] // self.k.shape[1]

    def first_state(self) -> Float[Tensor, "batch kv_heads features value_dim"]:
        """The state before the first token."""
        if self.state is not None:
            return self.state.to(self.accumulator)
        batch, heads, _, features = self.k.shape
        return self.k.new_zeros(batch, heads, features, self.v.shape[-1], dtype=self.accumulator)

    def decay_and_starts(self) -> Float[Tensor, "one_or_batch kv_heads length one_or_features"] | None:
        """The log-decay in which the first token of a document forgets what was before it."""
        if self.starts is None:
            return self.log_decay
        decay = self.log_decay
        if decay is None:
            decay = self.k.new_zeros(1, 1, 1, 1, dtype=self.accumulator).expand(1, *self.k.shape[1:3], 1)
        return decay.masked_fill(self.starts[:, None, :, None], float("-inf"))
