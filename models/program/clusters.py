"""Clusters of tokens around density peaks: centres are dense and far from anything denser."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.segments import ranks


def density_peaks(
    x: Float[Tensor, "segments tokens width"],
    valid: Bool[Tensor, "segments tokens"],
    clusters: Int[Tensor, " segments"],
) -> tuple[Bool[Tensor, "segments tokens"], Int[Tensor, "segments tokens"]]:
    """Mark ``clusters[s]`` centres in each segment; returns the marks and each token's centre (an index).

    Density is exp(-mean square distance to the nearest ``clusters[s]`` tokens, itself among them), distances being
    divided by the root of the width. Centres have the largest density times distance to a denser token (for the
    densest: the largest distance there is). Of equally dense tokens the earlier counts as denser, where the published
    code adds random noise. Tokens go to the nearest centre, centres to themselves.
    Source: Rodriguez and Laio (Science 2014), k-nearest form of Du et al. (2016), as in SparseVLM (ICML 2025), 3.4.
    """
    if not x.shape[1]:
        return valid, valid.long()
    wide = x if x.dtype == torch.float64 else x.float()
    pair = valid[:, :, None] & valid[:, None, :]
    wide = wide.masked_fill(~valid[..., None], 0)
    distance = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[2] ** 0.5
    near = distance.square().masked_fill(~pair, 0).masked_fill(~valid[:, None], torch.inf).sort(dim=2).values
    number = torch.arange(x.shape[1], device=x.device)
    among = (number < clusters[:, None]) & (number < valid.sum(1, keepdim=True))  # [S,P]
    density = (-near.masked_fill(~among[:, None], 0).sum(2) / among.sum(1, keepdim=True).clamp_min(1)).exp()
    earlier = number[None, :] < number[:, None]  # [P,P]: is the second one earlier than the first
    equal = (density[:, None, :] == density[:, :, None]) & earlier
    denser = ((density[:, None, :] > density[:, :, None]) | equal) & pair
    far = distance.masked_fill(~pair, 0).amax((1, 2))[:, None]  # [S,1]
    apart = torch.where(denser.any(2), distance.masked_fill(~denser, torch.inf).amin(2), far)
    centre = (ranks(density * apart, valid) < clusters[:, None]) & valid
    nearest = distance.masked_fill(~centre[:, None], torch.inf).argmin(2)
    return centre, torch.where(centre, number, nearest)
