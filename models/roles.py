"""The roles in a model that a recipe trains, freezes or adapts: vision, connector, language."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

ROLES = ("vision", "connector", "language")


class Role(NamedTuple):
    """What plays one role in a model, by the names of its weights.

    A weight belongs to the role with the longest place that begins its name: in Qwen2.5-VL the connector
    ``visual.merger`` lies inside the vision encoder ``visual``. places: where the role's modules (or lone parameters)
    lie in ``root``; others: where those of the other roles do; idle: where weights lie that no pass reads.
    """

    root: nn.Module
    places: tuple[str, ...]
    others: tuple[str, ...]
    idle: tuple[str, ...] = ()

    def owns(self, name: str) -> bool:
        """Whether the weight or module of that dotted name belongs to this role."""
        return _longest(name, self.places) > _longest(name, self.others)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Every parameter once, by its name in ``root``."""
        return [(name, value) for name, value in self.root.named_parameters() if self.owns(name)]

    def parameters(self) -> list[nn.Parameter]:
        return [value for _, value in self.named_parameters()]

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        return [(name, module) for name, module in self.root.named_modules() if self.owns(name)]

    def is_idle(self, name: str) -> bool:
        """Whether no pass reads the weight or module of that name, so that it can get no gradient."""
        return _longest(name, self.idle) >= 0

    def requires_grad_(self, wanted: bool) -> None:
        """Whether the part is trained; what no pass reads never is, because ranks would wait for its gradient."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(wanted and not self.is_idle(name))

    def train(self, mode: bool) -> None:
        """Training or evaluation mode (dropout, batch statistics) of these modules and no others."""
        for _, module in self.named_modules():
            module.training = mode


def split(root: nn.Module, places: Mapping[str, Sequence[str]], idle: Sequence[str] = ()) -> dict[str, Role]:
    """What plays each role in ``root``, from the dotted places of each and of the weights that no pass reads."""
    parts = {}
    for role, own in places.items():
        others = (place for name, other in places.items() if name != role for place in other)
        parts[role] = Role(root, tuple(own), tuple(others), tuple(idle))
    return parts


def _longest(name: str, places: Sequence[str]) -> int:
    return max((len(place) for place in places if name == place or name.startswith(f"{place}.")), default=-1)
