"""The definition of grouped-mass attention in plain PyTorch: any float type, any device, differentiable."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.kernels.few_rows import mixed, scores_of
from vlm.kernels.grouped_mass.rules import Rule
from vlm.kernels.row_chunks import in_row_chunks, softmax
from vlm.kernels.visibility import Operands


class Grouping(NamedTuple):
    """What grouped-mass attention knows beyond attention: groups, the rule, where it acts, and the map of scores."""

    group_ids: Int[Tensor, "batch one_or_heads keys"]
    rule: Rule
    row_sel: Bool[Tensor, "batch rows"]
    gamma: Float[Tensor, "heads groups"] | None
    beta: Float[Tensor, "heads groups"] | None
    key_bias: Float[Tensor, "batch one_or_heads keys"] | None
    stop_rule: bool  # whether coefficients count as constants in the backward
    lse: bool = True  # whether anybody asks for log-sum-exps; without, they may be left out

    @property
    def maps_scores(self) -> bool:
        return self.gamma is not None or self.beta is not None or self.key_bias is not None

    def coefficient(
        self, mass: Float[Tensor, "batch heads rows groups"], rows: slice = slice(None)
    ) -> Float[Tensor, "batch heads rows groups"]:
        """What the rule makes of the masses of ``rows``, a constant in the backward if ``stop_rule``."""
        return self.rule(mass.detach() if self.stop_rule else mass, self.row_sel[:, rows])


def grouped_mass_reference(x: Operands, grouping: Grouping) -> tuple[Tensor, Tensor, Tensor]:
    return _some_rows(x, grouping, slice(None))


def grouped_mass_torch(x: Operands, grouping: Grouping) -> tuple[Tensor, Tensor, Tensor]:
    """The reference a few rows at a time, recomputed in the backward: chunk x keys of memory, never rows x keys."""
    if x.q.shape[2] == 1 and _is_plain(x, grouping) and not torch.is_grad_enabled():
        assert x.v is not None
        groups, valid = (grouping.group_ids, grouping.rule, grouping.row_sel), x.seen.key_valid
        out, mass = one_row(x.q, x.k, x.v, *groups, valid, x.scale)
        return out, mass, mass.new_empty(0)
    out, mass, lse = in_row_chunks(lambda rows: _some_rows(x, grouping, rows), x.q.shape[2])
    return out, mass, lse


def _is_plain(x: Operands, grouping: Grouping) -> bool:
    """Whether a last row sees all valid keys by its model's own scores, and no more than output and masses are due."""
    seen = x.seen
    limits = (seen.row_valid, seen.row_position, seen.row_document, x.kv_head_of)
    return all(limit is None for limit in limits) and not (grouping.maps_scores or grouping.lse)


def one_row(
    q: Float[Tensor, "batch heads 1 dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    group_ids: Int[Tensor, "batch one_or_heads keys"],
    rule: Rule,
    row_sel: Bool[Tensor, "batch 1"],
    key_valid: Bool[Tensor, "batch keys"] | None,
    scale: float,
) -> tuple[Float[Tensor, "batch heads 1 value_dim"], Float[Tensor, "batch heads 1 groups"]]:
    """Output and masses of a row that sees all valid keys, in as few operations as there are and without any check: at
    a decoding step both cost as much as the row itself."""
    weights = scores_of(q, k, scale)[:, :, 0]  # [B,H,K]
    if key_valid is None:
        weights = weights.softmax(-1)
    else:
        hidden = ~key_valid[:, None]  # [B,1,K]; zeros for a row that sees nothing
        weights = weights.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0)
    ids = group_ids.long().expand_as(weights)
    mass = weights.new_zeros(*weights.shape[:2], rule.groups).scatter_add_(2, ids, weights)[:, :, None]
    weights = weights * rule(mass, row_sel)[:, :, 0].gather(2, ids)
    return mixed(weights[:, :, None], v), mass


def _some_rows(x: Operands, grouping: Grouping, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    assert x.v is not None
    heads, groups = x.q.shape[1], grouping.rule.groups
    scores = x.scores(rows)  # [B,H,Q,K], -inf where hidden
    every = torch.arange(groups, device=scores.device)
    membership = (grouping.group_ids[..., None] == every).to(scores.dtype)  # [B,1 or H,K,G]
    if grouping.maps_scores:
        acts = grouping.row_sel[:, None, rows, None]  # [B,1,Q,1]
        scores = torch.where(acts, _mapped(scores, grouping, membership.expand(-1, heads, -1, -1)), scores)
    weights, lse = softmax(scores)  # [B,H,Q,K], [B,H,Q]
    mass = _times(weights, membership)  # [B,H,Q,G]
    weights = weights * _times(grouping.coefficient(mass, rows), membership.transpose(-1, -2))
    return weights.to(x.v.dtype) @ x.per_head(x.v), mass, lse


def _times(
    x: Float[Tensor, "batch heads rows inner"], y: Float[Tensor, "batch one_or_heads inner outer"]
) -> Float[Tensor, "batch heads rows outer"]:
    """Their product; where all heads share ``y`` they are rows of one product, so ``y`` is not copied for each."""
    if y.shape[1] != 1:
        return x @ y
    return (x.flatten(1, 2) @ y[:, 0]).unflatten(1, x.shape[1:3])


def _mapped(scores: Tensor, grouping: Grouping, membership: Tensor) -> Tensor:
    """s + gamma |s| + beta + bias with the gamma and beta of each key's group; -inf stays."""
    hidden, s = scores.isinf(), scores.masked_fill(scores.isinf(), 0)
    of_key = lambda table: torch.einsum("bhkg,hg->bhk", membership, table.to(s.dtype))[:, :, None]  # noqa: E731
    mapped = s
    if grouping.gamma is not None:
        mapped = mapped + of_key(grouping.gamma) * s.abs()
    if grouping.beta is not None:
        mapped = mapped + of_key(grouping.beta)
    if grouping.key_bias is not None:
        mapped = mapped + grouping.key_bias.to(s.dtype)[:, :, None]
    return mapped.masked_fill(hidden, float("-inf"))
