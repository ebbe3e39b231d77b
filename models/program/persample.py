"""What a method finds out about each sample before it is answered."""

from dataclasses import dataclass
from typing import ClassVar

from vlm.models.program.signals import Given


@dataclass(frozen=True)
class PerSample(Given):
    """What comes from outside for each sample as a whole: ``scores`` gives [batch, ...]. Beams of a sample share it."""

    axis: ClassVar[int] = 0
