"""What happens inside a decoder layer besides cuts: the newest row's attention, gates on heads, edits of the MLP.

Hooks of :func:`hook_layers` stand on a layer (where the pass's run is known) and on its output projection and MLP.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlm.kernels.few_rows import mixed, scores_of
from vlm.kernels.grouped_mass import grouped_mass_attention
from vlm.kernels.grouped_mass.reference import one_row
from vlm.kernels.grouped_mass.rules import Static
from vlm.kernels.visibility import Common
from vlm.models.errors import ModelError
from vlm.models.program.layout import Layout
from vlm.models.program.program import Edit, EditBlock, Gate, Keys, Program, Regroup, Rescore
from vlm.models.program.run import Run

Sight = Callable[[Run, int], Keys]  # what an op sees of a layer


def newest_row(layout: Layout, rows: int) -> Int[Tensor, " batch"]:
    """The number, among the last ``rows`` places, of each sample's last token."""
    return (layout.last(layout.valid) - (layout.role.shape[1] - rows)).clamp_min(0)


def row_scores(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    visible: Bool[Tensor, "batch #rows keys"] | None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads rows keys"]:
    """Scaled scores of a few rows, in single precision or more; -inf where a key is hidden (None: nowhere)."""
    scores = scores_of(q, k, q.shape[3] ** -0.5 if scale is None else scale)
    return scores if visible is None else scores.masked_fill(~visible[:, None], -torch.inf)


def rescored(
    op: Rescore,
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys dim"],
    keys: Keys,
    scale: float | None,
    padded: bool = True,
) -> tuple[Float[Tensor, "batch heads dim"], Int[Tensor, " batch"] | None]:
    """The newest row's attention output under ``op``, and which of the call's rows it is; None if there is but one."""
    row, own = None, q
    if q.shape[2] > 1:
        row = newest_row(keys.layout, q.shape[2])
        own = q.gather(2, row[:, None, None, None].expand(-1, q.shape[1], 1, q.shape[3]))  # [B,H,1,D]
    visible = keys.layout.valid[:, None] if padded else None
    scores = row_scores(own, k, visible, scale)[:, :, 0]  # [B,H,K]; the last token sees them all
    if op.scores is not None:
        scores = op.scores(scores, keys)
    weights = scores.softmax(-1)
    if op.weights is not None:
        weights = op.weights(weights, keys)
    return mixed(weights[:, :, None], v)[:, :, 0], row


def regrouped(
    op: Regroup,
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys dim"],
    out: Float[Tensor, "batch rows heads dim"],
    seen: Keys,
    impl: str,
    common: Common,
) -> Float[Tensor, "batch rows heads dim"]:
    """Plain attention ``out`` with the rows that ``op`` means reweighed; the rows before them cost nothing."""
    rows, keys, layout = q.shape[2], k.shape[2], seen.layout
    after = layout.last(layout.visual)  # [B], -1 for a sample without an image
    first = after.masked_fill(after < 0, keys) + 1
    if op.everywhere:
        first = torch.zeros_like(after)
    start = max(int(first.min()) - (keys - rows), 0)
    if start >= rows:
        return out
    place = torch.arange(keys - rows + start, keys, device=q.device)
    chosen = (place >= first[:, None]) & layout.valid[:, place]  # [B, rows - start]
    groups = op.groups(seen)
    new, _ = grouped_mass_attention(q[:, :, start:], k, v, groups, rule=op.rule, row_sel=chosen, impl=impl, **common)
    tail = torch.where(chosen[:, :, None, None], new.transpose(1, 2), out[:, start:])
    return torch.cat([out[:, :start], tail], 1)


class Reach(NamedTuple):
    """The samples whose generated tokens an op reweighs, and whether there are any."""

    rows: Bool[Tensor, "batch 1"]
    any: bool

    @classmethod
    def of(cls, op: Regroup, layout: Layout) -> "Reach":
        """Looked up once for an answer, as looking waits for the device."""
        rows = layout.visual.any(1, keepdim=True) | op.everywhere
        return cls(rows, op.everywhere or bool(rows.any()))


def only_row(
    op: Regroup | Rescore,
    q: Float[Tensor, "batch heads 1 dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys dim"],
    keys: Keys,
    impl: str,
    common: Common,
) -> Float[Tensor, "batch 1 heads dim"] | None:
    """The attention of a generated token under ``op``, computed once and not over plain attention; None where plain
    attention is all there is to do."""
    valid, scale = common.get("key_valid"), common.get("scale")
    if isinstance(op, Rescore):
        return rescored(op, q, k, v, keys, scale, valid is not None)[0][:, None]
    reach: Reach = keys.lasting((Reach, op.everywhere), lambda: Reach.of(op, keys.layout))
    if not reach.any:
        return None
    rule, chooses = op.rule, impl == "auto" and not torch.is_grad_enabled()
    if chooses and isinstance(rule, Static) and rule.adds_logs:
        logs = keys.grown((op.groups, rule), lambda: log_gains(rule, op.groups(keys), reach.rows, q.dtype))
        same = Rescore(scores=lambda scores, keys: scores + logs)
        return rescored(same, q, k, v, keys, scale, valid is not None)[0][:, None]
    groups = keys.grown(op.groups, lambda: op.groups(keys))
    if chooses and q.device.type == "cpu":  # what it chooses there
        ids, scale = groups if groups.ndim == 3 else groups[:, None], q.shape[3] ** -0.5 if scale is None else scale
        out, _ = one_row(q, k, v, ids, rule, reach.rows, valid, scale)
    else:
        out, _ = grouped_mass_attention(q, k, v, groups, rule=rule, row_sel=reach.rows, impl=impl, **common)
    return out.transpose(1, 2)


def log_gains(
    rule: Static,
    groups: Int[Tensor, "batch keys"] | Int[Tensor, "batch heads keys"],
    rows: Bool[Tensor, "batch 1"],
    dtype: torch.dtype,
) -> Float[Tensor, "batch one_or_heads keys"]:
    """What renormalised gains add to the scores of each key in the samples of ``rows``."""
    logs = rule.gains.to(groups.device, torch.promote_types(dtype, torch.float32)).log()
    ids = groups if groups.ndim == 3 else groups[:, None]
    shape = (len(ids), max(ids.shape[1], logs.shape[0] if logs.ndim == 2 else 1))
    of_key = logs.expand(*shape, rule.groups).gather(2, ids.expand(*shape, -1))  # [B,1 or H,K]
    return torch.where(rows[:, :, None], of_key, 0.0)


def put_row(
    out: Float[Tensor, "batch rows heads dim"], new: Float[Tensor, "batch heads dim"], row: Int[Tensor, " batch"] | None
) -> Float[Tensor, "batch rows heads dim"]:
    """``out`` with another row in each sample."""
    if row is None:
        return new[:, None].to(out.dtype)
    return out.index_put((torch.arange(len(out), device=out.device), row), new.to(out.dtype))


def ops_at(program: Program, kind: type) -> dict[int, list[Any]]:
    """The ops of a kind by their layer, in order."""
    found: dict[int, list[Any]] = {}
    for site, op in program:
        if isinstance(op, kind):
            found.setdefault(site.layer, []).append(op)
    return found


def hook_layers(
    decoder: Any,
    gates: Mapping[int, Sequence[Gate]],
    edits: Mapping[int, Sequence[Edit]],
    run_of: Callable[[Any], Run],
    sight: Sight,
    resting: Callable[[], bool],
) -> list[RemovableHandle]:
    """Hooks that make the program's gates and edits, but while it is ``resting``.

    Raises ModelError for a layer that is built otherwise.
    """
    handles: list[RemovableHandle] = []
    for number in sorted({*gates, *edits}):
        layer = decoder.layers[number]
        now = _Now(number, run_of, sight, resting)
        handles.append(layer.register_forward_pre_hook(now.enter, with_kwargs=True))
        for gate in gates.get(number, ()):
            handles.append(output_projection(layer).register_forward_pre_hook(now.gating(gate)))
        for edit in edits.get(number, ()):
            handles.append(_mlp(layer).register_forward_hook(now.editing(edit)))
    return handles


def hook_encoder(model: Any, program: Program, resting: Callable[[], bool]) -> list[RemovableHandle]:
    """Hooks that make the program's edits of the vision encoder, but while it is ``resting``. Raises ModelError for a
    block that is built otherwise."""

    def editing(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        return lambda mlp, args, out: None if resting() else change(out).to(out.dtype)

    edits = [(site.layer, op) for site, op in program if isinstance(op, EditBlock)]
    return [
        _mlp(model.vision.blocks[number], "vit.resid").register_forward_hook(editing(op.change)) for number, op in edits
    ]


class _Now:
    """The run that a layer is in, for the modules inside it, which are not told."""

    def __init__(self, number: int, run_of: Callable[[Any], Run], sight: Sight, resting: Callable[[], bool]) -> None:
        self.number, self.run_of, self.sight, self.resting = number, run_of, sight, resting
        self.run: Run | None = None

    def enter(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.resting():
            self.run = self.run_of(kwargs)

    def keys(self) -> Keys:
        assert self.run is not None
        return self.sight(self.run, self.number)

    def gating(self, gate: Gate) -> Callable[..., Any]:
        def hook(projection: nn.Module, args: tuple) -> tuple | None:
            if self.resting():
                return None
            assert self.run is not None
            keys, memo, key = self.keys(), self.run.memo, (gate, self.number)
            x: Tensor = args[0]  # [B,R,H*D]
            if self.run.prompt or key not in memo:  # the same throughout an answer
                gains = gate.gains(keys).to(x.dtype)  # [B,H]
                memo[key] = gains.repeat_interleave(x.shape[2] // gains.shape[1], 1)  # [B,H*D]
            gains = memo[key]
            if x.shape[1] == 1:
                return (x * gains[:, None], *args[1:])
            place = (torch.arange(len(x), device=x.device), newest_row(keys.layout, x.shape[1]))
            return (x.index_put(place, x[place] * gains), *args[1:])

        return hook

    def editing(self, edit: Edit) -> Callable[..., Any]:
        def hook(mlp: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
            if self.resting():
                return None
            assert self.run is not None
            keys, has_image = self.keys(), self.run.total > 0
            changed = edit.change(out, keys).to(out.dtype)
            if not self.run.prompt and keys.lasting("all have images", lambda: bool(has_image.all())):
                return changed
            return torch.where(has_image[:, None, None], changed, out)

        return hook


def output_projection(layer: Any) -> nn.Module:
    """The module that joins a layer's heads. Raises ModelError for a layer without one of the usual name."""
    for name in ("o_proj", "out_proj", "dense"):
        if hasattr(getattr(layer, "self_attn", None), name):
            return getattr(layer.self_attn, name)
    raise ModelError(f"heads: {type(layer).__name__} has no self_attn.o_proj, where the outputs of heads are joined")


def _mlp(layer: Any, site: str = "resid") -> nn.Module:
    if isinstance(found := getattr(layer, "mlp", None), nn.Module):
        return found
    raise ModelError(f"{site}: {type(layer).__name__} has no mlp whose output could be edited")
