"""The numbers of a decoder that the cost of a prompt depends on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderShape:
    """The numbers of a decoder that cost depends on: cache entries are ``2 kv_heads head_dim itemsize`` bytes."""

    layers: int
    width: int
    mlp: int
    kv_heads: int
    head_dim: int
    itemsize: int = 2

    def flops(self, tokens: float) -> float:
        """Multiply-accumulates of one layer over ``tokens`` tokens: 4 n D^2 + 2 n^2 D + 3 n D m.

        The count of the pruning literature for a gated MLP (SparseVLM's code). It takes keys and values as wide as
        the model, so it is too high with fewer key/value heads.
        """
        return 4 * tokens * self.width**2 + 2 * tokens**2 * self.width + 3 * tokens * self.width * self.mlp

    def kv_bytes(self, tokens: float) -> float:
        """Bytes of one layer's cache of ``tokens`` tokens."""
        return tokens * 2 * self.kv_heads * self.head_dim * self.itemsize
