"""A probe that reads in a hidden state whether the token that it predicts will be made up, and its transfer.

Source: TruthPrInt and ComnHallu (ICCV 2025), section 3; the repository has no code, so sizes and settings are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.models.errors import ModelError
from vlm.models.program.artifact import ANY, Artifact, contents, write
from vlm.models.program.attach import attach
from vlm.models.program.program import LOGITS, Rewrite

WHO = "truthprint"  # whose artifacts probes are


class Space(NamedTuple):
    """Where a probe reads states: less ``centre``, of length 1, and with ``basis`` in its coordinates."""

    centre: Float[Tensor, " width"]
    basis: Float[Tensor, "width kept"] | None = None

    def read(self, states: Float[Tensor, "rows width"]) -> Float[Tensor, "rows kept"]:
        unit = nn.functional.normalize(states.to(self.centre) - self.centre, dim=-1)
        return unit if self.basis is None else unit @ self.basis


def space_of(states: Float[Tensor, "rows width"], kept: int | None = None) -> Space:
    """The space of some states: their mean, and with ``kept`` so many principal directions of the unit vectors."""
    space = Space(states.float().mean(0))
    if kept is None:
        return space
    if kept > min(states.shape):
        raise ModelError(f"probe: expected at most {min(states.shape)} directions of these states; found {kept}")
    return space._replace(basis=torch.linalg.svd(space.read(states), full_matrices=False).Vh[:kept].T.contiguous())


def aligned(
    source: Float[Tensor, "rows width"], target: Float[Tensor, "others width"], kept: int = 64
) -> tuple[Float[Tensor, "rows kept"], Space]:
    """States of one model or data set in the coordinates of another's, and the space in which those are read.

    With the principal directions P of both, the source's coordinates are turned by P_source^T P_target (subspace
    alignment), so that a probe that learns from them reads the target, which needs no labels. Source: ComnHallu.
    """
    own, other = space_of(source, kept), space_of(target, kept)
    assert own.basis is not None and other.basis is not None
    return own.read(source) @ (own.basis.T @ other.basis), other


@dataclass(frozen=True, eq=False)
class Probe:
    """Two layers with a ReLU between them, and a sigmoid.

    layer: decoder layers behind the states that it reads. threshold: above it a token counts as made up. first, second:
    weights with a last column for the constant.
    """

    layer: int
    threshold: float
    space: Space
    first: Float[Tensor, "hidden kept_and_one"]
    second: Float[Tensor, "one hidden_and_one"]

    @property
    def width(self) -> int:
        return len(self.space.centre)

    def score(self, states: Float[Tensor, "rows width"]) -> Float[Tensor, " rows"]:
        """Probability that what the state predicts is made up."""
        return self.score_features(self.space.read(states))

    def score_features(self, x: Float[Tensor, "rows kept"]) -> Float[Tensor, " rows"]:
        hidden = (x @ self.first[:, :-1].T + self.first[:, -1]).relu()
        return (hidden @ self.second[:, :-1].T + self.second[:, -1]).sigmoid()[:, 0]

    def to(self, device: Any) -> "Probe":
        space = Space(*(None if part is None else part.to(device) for part in self.space))  # type: ignore[arg-type]
        return replace(self, space=space, first=self.first.to(device), second=self.second.to(device))

    @property
    def artifact(self) -> Artifact:
        """The probe as a calibration keeps it."""
        tensors = {"centre": self.space.centre, "first": self.first, "second": self.second}
        tensors |= {} if self.space.basis is None else {"basis": self.space.basis}
        return Artifact(tensors, {"layer": str(self.layer), "threshold": repr(self.threshold)})

    def save(self, path: Path) -> None:
        """Write a file for any model: one that is transferred belongs to no weights."""
        tensors, about = self.artifact
        write(path, tensors, {"method": WHO, "weights": ANY, **about})


def probe_of(found: Artifact) -> Probe:
    """The probe that an artifact holds. Raises ModelError where that is none."""
    if missing := {"layer", "threshold"} - set(found.about) or {"centre", "first", "second"} - set(found.tensors):
        raise ModelError(f"probe: expected a probe of hidden states; found a file without {', '.join(sorted(missing))}")
    tensors = found.tensors
    space = Space(tensors["centre"], tensors.get("basis"))
    return Probe(int(found.about["layer"]), float(found.about["threshold"]), space, tensors["first"], tensors["second"])


def load_probe(path: str) -> Probe:
    """Raises ModelError for anything but a probe."""
    found = contents(Path(path), "probe")
    if found.about.get("method") != WHO:
        other = found.about.get("method", "another file")
        raise ModelError(f"{path}: expected a probe of hidden states; found {other}")
    return probe_of(found)


@torch.enable_grad()
def fit_probe(
    states: Float[Tensor, "rows features"],
    made_up: Bool[Tensor, " rows"],
    layer: int,
    *,
    space: Space | None = None,
    hidden: int = 256,
    steps: int = 300,
    held_out: float = 0.2,
    specificity: float = 0.99,
    seed: int = 0,
) -> Probe:
    """Learn which states predict tokens that are made up.

    states: of the token before each mention, after ``layer`` decoder layers; with ``space`` they are already read in
    it (see :func:`aligned`). Both kinds of label count alike however many they are. A share ``held_out`` of the rows
    is not learned from; the threshold is the smallest one at which so large a share of its true mentions pass
    (``specificity``). Raises ModelError where either part lacks one of the labels.
    """
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))
    test, train = order[: round(held_out * len(order))], order[round(held_out * len(order)) :]
    for name, part in (("learn from", train), ("judge by", test)):
        if made_up[part].sum() in (0, len(part)):
            raise ModelError(f"probe: expected true and made-up mentions to {name}; found one kind among {len(part)}")
    space_, x = (space, states.float()) if space else ((own := space_of(states[train])), own.read(states))
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    truth = made_up[train].float()
    weight = torch.where(made_up[train], 0.5 / truth.mean(), 0.5 / (1 - truth.mean()))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(net(x[train])[:, 0], truth, weight)
        loss.backward()
        optimizer.step()
    first, second = (torch.cat([part.weight, part.bias[:, None]], 1).detach() for part in (net[0], net[2]))  # type: ignore[list-item]
    probe = Probe(layer, 0.0, space_, first, second)
    scores = probe.score_features(x[test])
    return replace(probe, threshold=threshold_at(scores[~made_up[test]], specificity))


def threshold_at(scores: Float[Tensor, " true"], specificity: float) -> float:
    """The smallest of the scores of true mentions that this share of them does not exceed."""
    return float(scores.sort().values[max(-int(-specificity * len(scores) // 1) - 1, 0)])


@torch.no_grad()
def answer_states(
    model: Any, inputs: Any, answers: Sequence[Sequence[int]], layer: int
) -> list[Float[Tensor, "tokens width"]]:
    """For each prompt the states, after ``layer`` decoder layers, that predict the tokens of its answer.

    The program that a probe is to be used under may be attached around nothing here: states are the bare model's.
    """
    watch = Rewrite(lambda now: now.main, inner=(layer,))
    longest = max(map(len, answers), default=0)
    found = []
    with attach(model, ((LOGITS, watch),)):
        _, stream = model.prefill(inputs)
        for step in range(longest):
            found.append(stream.run.inner[layer])
            tokens = [answer[step] if step < len(answer) else 0 for answer in answers]
            if step < longest - 1:
                model.step(stream, inputs.tokens.new_tensor(tokens))
    whole = torch.stack(found, 1) if found else None  # [B, longest, width]
    return [whole[row, : len(answer)] if whole is not None else torch.zeros(0, 0) for row, answer in enumerate(answers)]
