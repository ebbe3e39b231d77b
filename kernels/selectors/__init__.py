"""Selectors: which blocks of keys each block of rows attends to.

One file each, named after its paper. A selector takes q and k as attention does and returns
:class:`~vlm.kernels.sparse.lists.BlockLists` for :func:`~vlm.kernels.sparse.block_sparse_attention`; one that reorders
the tokens returns an :class:`~vlm.kernels.selectors.order.Order` as well. No gradient flows through a selection.

| file | chooses by | for | blocks |
|---|---|---|---|
| moba | mean key of each block, per row | causal | 1 x block |
| vmoba | the same over 1-D, 2-D or 3-D boxes; top-k or threshold | images, video | 1 x box, reordered |
| dhsa | mean query and mean key of blocks | causal prefill | 128 x 32 |
| biformer | mean query and mean key of regions, all heads together | images | region x region, reordered |
| s2 | nothing: local and strided blocks, shifted by head | both | block x block |
| power | nothing: distances that are powers of two | causal | block x block |
| stochastic | chance | both | block x block, reordered |
"""
