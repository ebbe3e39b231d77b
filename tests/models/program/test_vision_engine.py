"""Programs inside vision encoders: what is read and what is cut, against attention and blocks written out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import open_clip
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn
from transformers import (
    AutoModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    SiglipVisionConfig,
)

from vlm.models.backbones.huggingface import HuggingFace
from vlm.models.backbones.openclip import OpenClip
from vlm.models.encoder import ImageSpec, TimmEncoder
from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.merge import merge_pairs
from vlm.models.program.program import VIT_OUT, Program, Select, Selector, Tokens, check, vit_after, vit_mid
from vlm.models.program.reduce import Reduced
from vlm.models.program.signals import (
    OneHeadClassRow,
    PatchAttention,
    PatchFlow,
    PatchKeys,
    Signal,
    Vision,
    encoder_of,
)
from vlm.models.program.vision import VisionEngine

ALL = Budget.parse("100%")
SPEC = ImageSpec(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
GRID = {"image_size": 32, "patch_size": 8, "initializer_range": 0.3}
CONFIGS = {
    "clip": CLIPVisionConfig(**SIZES, **GRID),
    "siglip": SiglipVisionConfig(**SIZES, **GRID, vision_use_head=False),
    "dinov2": Dinov2WithRegistersConfig(**SIZES, **GRID, num_register_tokens=4),
    "dinov3": DINOv3ViTConfig(**SIZES, **GRID, num_register_tokens=2),
}
TIMM = {
    "timm": {"class_token": True},
    "timm registers": {"class_token": True, "reg_tokens": 3, "init_values": 0.5},
    "timm without": {"class_token": False, "qk_norm": True},
}
OPEN = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 32, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}


def loud(encoder: Any) -> Any:
    """Weights so large that attention is far from even; double precision."""
    g = torch.Generator().manual_seed(0)
    for name, weight in encoder.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3, generator=g)
        elif name.endswith("bias"):
            nn.init.normal_(weight, std=0.1, generator=g)
    return encoder.double().eval()


def timm_encoder(layer: int = -1, **options: Any) -> Any:
    sizes: Any = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
    model = VisionTransformer(**sizes, num_classes=0, global_pool="", **options)
    return loud(TimmEncoder(model, SPEC, layer))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        AutoModel.from_config(config).save_pretrained(found[name])
        CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(found[name])
    return found


@pytest.fixture
def make(folders: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", OPEN)

    def make(name: str, layer: int = -1) -> Any:
        if name in TIMM:
            return timm_encoder(layer, **TIMM[name])
        return loud(OpenClip("tiny", layer=layer) if name == "openclip" else HuggingFace(str(folders[name]), layer))

    return make


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@contextmanager
def under(encoder: Any, program: Program) -> Iterator[VisionEngine]:
    engine = VisionEngine(encoder, program, 0, "auto")
    handles = engine.hook()
    try:
        yield engine
    finally:
        for handle in handles:
            handle.remove()


def encode(engine: VisionEngine, images: Tensor) -> tuple[Tensor, Reduced | None]:
    each = torch.arange(len(images))
    engine.begin(lambda: each, each)
    tokens = engine.encoder(images).tokens
    return tokens, engine.finish(tokens)


def run(encoder: Any, program: Program, images: Tensor) -> tuple[Tensor, Reduced | None]:
    with under(encoder, program) as engine:
        return encode(engine, images)


def read(encoder: Any, *signals: Signal, site: Any = VIT_OUT, images: Tensor | None = None) -> dict[Signal, Tensor]:
    """What a selector that keeps everything sees."""
    seen: dict[Signal, Tensor] = {}

    def choose(tokens: Tokens, count: Tensor) -> Tensor:
        seen.update({signal: tokens.signal(signal) for signal in signals})
        return tokens.valid

    run(
        encoder,
        ((site, Select(ALL, Selector(choose, signals), exact=False)),),
        pictures() if images is None else images,
    )
    return seen


def inputs_of_blocks(encoder: Any, images: Tensor) -> list[Tensor]:
    """What enters each block of the bare encoder."""
    seen: list[Tensor] = []
    handles = [b.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for b in encoder.blocks]
    encoder(images)
    for handle in handles:
        handle.remove()
    return seen


def projections(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [images, heads, tokens, dim] of a block, with its own layers."""

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(2, (4, -1)).transpose(1, 2)

    if hasattr(block, "ln_1"):  # open_clip
        attention = block.attn
        return tuple(map(heads, (block.ln_1(x) @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, 2)))  # type: ignore[return-value]
    if hasattr(block, "attn"):  # timm
        q, k, v = map(heads, block.attn.qkv(block.norm1(x)).chunk(3, 2))
        return block.attn.q_norm(q), block.attn.k_norm(k), v
    attention = getattr(block, "self_attn", None) or block.attention
    normed = block.layer_norm1(x) if hasattr(block, "layer_norm1") else block.norm1(x)
    return tuple(heads(f(normed)) for f in (attention.q_proj, attention.k_proj, attention.v_proj))  # type: ignore[return-value]


def softmax_rows(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1)


# What is read


@pytest.mark.parametrize("name", [*TIMM, "openclip", "clip", "siglip", "dinov2"])
def test_signals_are_those_of_eager_attention(make, name):
    encoder, images, block = make(name), pictures(), 2
    x, prefix = inputs_of_blocks(encoder, images)[block], encoder.prefix
    q, k, v = projections(encoder.blocks[block], x)
    attention = softmax_rows(q, k)  # [images, heads, tokens, tokens]
    mean_query = softmax_rows(q.mean(2, keepdim=True), k)[:, :, 0]
    expected: dict[Signal, Tensor] = {
        PatchAttention(block, "all"): attention.mean(2)[..., prefix:],
        PatchAttention(block, "mean"): mean_query[..., prefix:],
        PatchKeys(block): k[:, :, prefix:],
        PatchFlow(block, False): mean_query.mean(1)[:, prefix:] * v.mean(1).abs().sum(2)[:, prefix:],
    }
    if encoder.class_token:
        wide_q, wide_k = (t.transpose(1, 2).flatten(2)[:, None] for t in (q, k))
        row = attention[:, :, 0].mean(1)[:, prefix:]
        own, others = v[:, :, :1], v[:, :, prefix:]
        cosine = nn.functional.cosine_similarity(own, others, dim=-1).clamp_min(0).mean(1)
        product = torch.cat([own, others], 2) @ own.transpose(2, 3)
        alike = product.softmax(2).mean(1)[:, 1:, 0]  # over the class token too
        shares = lambda t: t / t.sum(1, keepdim=True)  # noqa: E731
        strength = others.mean(1).abs().sum(2)
        expected |= {
            PatchAttention(block, "class"): attention[:, :, 0, prefix:],
            OneHeadClassRow(block): softmax_rows(wide_q, wide_k)[:, 0, 0, prefix:],
            PatchFlow(block): (shares(row) + shares(alike)) * strength,
            PatchFlow(block, similarity="cosine"): (shares(row) + shares(cosine)) * strength,
        }
    found = read(encoder, *expected, images=images)
    for signal, value in expected.items():
        # the score of flow is taken in single precision
        near = 1e-5 if isinstance(signal, PatchFlow) else 1e-10
        torch.testing.assert_close(found[signal], value, rtol=near, atol=near, check_dtype=False)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov3"])
def test_attention_is_what_transformers_returns_with_eager_attention(make, folders, name):
    encoder = make(name)
    stock = AutoModel.from_pretrained(folders[name], attn_implementation="eager").double().eval()
    stock.load_state_dict(encoder.model.state_dict())
    expected = stock(pictures(), output_attentions=True).attentions  # [images, heads, tokens, tokens] of each block
    for block in range(4):
        signals = [PatchAttention(block, "all"), *([PatchAttention(block, "class")] if encoder.class_token else [])]
        found = read(encoder, *signals)
        received = expected[block].mean(2)[..., encoder.prefix :]
        torch.testing.assert_close(found[signals[0]], received, rtol=0, atol=1e-6)
        if encoder.class_token:
            row = expected[block][:, :, 0, encoder.prefix :]
            torch.testing.assert_close(found[signals[1]], row, rtol=0, atol=1e-6)


def test_a_signal_of_an_earlier_block_comes_along_with_what_a_cut_keeps(make):
    encoder = make("timm")
    signal, kept, later = PatchAttention(0, "class"), [1, 5, 6, 14], {}

    def some(tokens: Tokens, count: Tensor) -> Tensor:
        return torch.zeros_like(tokens.valid).index_fill(1, torch.tensor(kept), True)

    def choose(tokens: Tokens, count: Tensor) -> Tensor:
        later["signal"], later["place"] = tokens.signal(signal), tokens.row * 4 + tokens.col
        return tokens.valid

    first, second = Select(ALL, Selector(some), exact=False), Select(ALL, Selector(choose, (signal,)), exact=False)
    run(encoder, ((vit_after(1), first), (VIT_OUT, second)), pictures())
    assert later["place"].tolist() == [kept, kept]
    assert torch.equal(later["signal"], read(encoder, signal)[signal][..., kept])


def test_attention_after_a_ragged_cut_is_that_of_the_kept_alone(make):
    encoder, images = make("timm"), pictures(3)
    signals = [PatchAttention(3, "class"), PatchAttention(3, "all"), PatchAttention(3, "mean"), OneHeadClassRow(3)]
    seen: list[tuple[Tensor, list[Tensor]]] = []

    def choose(tokens: Tokens, count: Tensor) -> Tensor:
        seen.append((tokens.valid, [tokens.signal(signal) for signal in signals]))
        return tokens.valid

    program = (ragged(1), (VIT_OUT, Select(ALL, Selector(choose, tuple(signals)), exact=False)))
    run(encoder, program, images)
    for n in range(3):
        run(encoder, program, images[n : n + 1])
    (valid, together), *singles = seen
    assert len({*valid.sum(1).tolist()}) > 1
    for n, (_, alone) in enumerate(singles):
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(all_of_them[n][..., valid[n]], one[0], rtol=0, atol=1e-10)


# What is cut

SHARE = 0.1


def positive(tokens: Tokens, count: Tensor) -> Tensor:
    """A choice by the features, so that other images keep other numbers."""
    kept = tokens.x[..., 0] > tokens.x[..., 0].max(1, keepdim=True).values * SHARE
    return kept & tokens.valid


def ragged(block: int, mid: bool = False) -> Any:
    return (vit_mid if mid else vit_after)(block), Select(ALL, Selector(positive), exact=False)


def pairs(merges: int, block: int) -> Selector:
    """Merge so many pairs of like keys, one fewer in every second image."""
    keys = PatchKeys(block)

    def merge(tokens: Tokens) -> Reduced:
        size = tokens.size if tokens.size is not None else torch.ones(tokens.valid.shape)
        number = merges - torch.arange(len(tokens.valid)) % 2
        return merge_pairs(tokens.x, tokens.signal(keys).mean(1), size, tokens.valid, number)

    def choose(tokens: Tokens, count: Tensor) -> Tensor:
        left = merge(tokens)
        return torch.zeros_like(tokens.valid).scatter(1, left.place, left.valid)

    return Selector(choose, (keys,), lambda tokens, kept, count: merge(tokens))


def merging(*blocks: int) -> Program:
    return tuple((vit_mid(block), Select(ALL, pairs(3, block), exact=False, weigh=True)) for block in blocks)


def by_hand(encoder: Any, image: Tensor, block: int, mid: bool) -> Tensor:
    """Features of one image whose patches are cut in ``block``, by the encoder's own layers on what is left."""
    prefix = encoder.prefix
    x = inputs_of_blocks(encoder, image[None])[block]
    layer = encoder.blocks[block]
    more = () if type(layer).__module__.startswith("timm") else (None,)

    def cut(hidden: Tensor) -> Tensor:
        first = hidden[0, prefix:, 0]
        kept = first > first.max() * SHARE
        return torch.cat([hidden[:, :prefix], hidden[:, prefix:][:, kept]], 1)

    if not mid:
        x = cut(layer(x, *more) if more else layer(x))
    else:
        q, k, v = projections(layer, x)
        mixed = (softmax_rows(q, k) @ v).transpose(1, 2).flatten(2)
        attention = next(getattr(layer, n) for n in ("attn", "self_attn", "attention") if hasattr(layer, n))
        out = next(getattr(attention, n) for n in ("proj", "out_proj", "o_proj") if hasattr(attention, n))(mixed)
        scale1 = getattr(layer, "ls1", getattr(layer, "layer_scale1", nn.Identity()))
        scale2 = getattr(layer, "ls2", getattr(layer, "layer_scale2", nn.Identity()))
        norm = layer.layer_norm2 if hasattr(layer, "layer_norm2") else layer.norm2
        x = cut(x + scale1(out))
        x = x + scale2(layer.mlp(norm(x)))
    for layer in encoder.blocks[block + 1 : encoder.output + 1]:
        x = layer(x, *more)
    if getattr(encoder, "norm", False):
        x = encoder.model.norm(x)
    return x[0, prefix:]


@pytest.mark.parametrize("mid", [False, True], ids=["after", "mid"])
@pytest.mark.parametrize("name", [*TIMM, "clip", "siglip", "dinov2"])
def test_a_ragged_cut_is_each_image_by_itself(make, name, mid):
    encoder, images = make(name, -2 if name in CONFIGS else -1), pictures(3)
    tokens, cut = run(encoder, (ragged(1, mid),), images)
    assert cut is not None and len({*cut.valid.sum(1).tolist()}) > 1
    assert cut.features is tokens
    for n in range(3):
        alone, single = run(encoder, (ragged(1, mid),), images[n : n + 1])
        assert single is not None and cut.place[n, cut.valid[n]].tolist() == single.place[0].tolist()
        torch.testing.assert_close(tokens[n, cut.valid[n]], alone[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(alone[0], by_hand(encoder, images[n], 1, mid), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["timm", "clip"])
def test_a_cut_of_the_last_block_is_cut_also_where_hidden_states_are_collected(make, name):
    encoder, images = make(name, -2), pictures(3)
    bare = encoder(images).tokens  # Transformers collects from now on, by hooks older than ours
    tokens, cut = run(encoder, (ragged(encoder.output),), images)
    assert cut is not None
    for n in range(3):
        assert torch.equal(tokens[n, cut.valid[n]], bare[n, cut.place[n, cut.valid[n]]])


def test_merged_patches_weigh_in_the_attention_of_later_blocks(make):
    encoder, images = make("timm"), pictures(2)
    tokens, cut = run(encoder, merging(1, 2), images)
    assert cut is not None and cut.valid.sum(1).tolist() == [10, 12]
    for n in range(2):
        x, size = inputs_of_blocks(encoder, images[n : n + 1])[0], torch.ones(1, 16)
        for number, block in enumerate(encoder.blocks):
            q, k, v = projections(block, x)
            weigh = torch.cat([torch.ones(1, 1), size], 1).double().log()[:, None, None]
            mixed = ((q @ k.transpose(2, 3) * 8**-0.5 + weigh).softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + block.attn.proj(mixed)
            if number in (1, 2):
                key, valid = k[:, :, 1:].mean(1), torch.ones(size.shape, dtype=torch.bool)
                left = merge_pairs(x[:, 1:], key, size, valid, torch.tensor([3 - n]))
                assert left.size is not None
                x, size = torch.cat([x[:, :1], left.features], 1), left.size
            x = x + block.mlp(block.norm2(x))
        x = encoder.model.norm(x)
        torch.testing.assert_close(tokens[n, cut.valid[n]], x[0, 1:], rtol=0, atol=1e-10)


def test_padding_of_a_view_is_seen_but_never_kept(make):
    encoder, images = make("timm"), pictures(3)
    real = torch.ones(3, 16, dtype=torch.bool)
    real[2, 8:] = False  # the lower half of the third view shows nothing
    seen: list[Tokens] = []

    def choose(tokens: Tokens, count: Tensor) -> Tensor:
        seen.append(tokens)
        return tokens.valid & (tokens.valid.cumsum(1) <= count[:, None])

    program: Program = ((VIT_OUT, Select(Budget.parse("50%"), Selector(choose, (PatchAttention(0, "class"),)))),)
    with under(encoder, program) as engine:
        engine.begin(lambda: torch.arange(3), torch.tensor([0, 1, 1]), real)
        cut = engine.finish(engine.encoder(images).tokens)
    [tokens] = seen
    assert torch.equal(tokens.valid, real) and tokens.total.tolist() == [16, 16, 8]
    assert tokens.image[:, 0].tolist() == [0, 1, 1]
    expected = read(encoder, PatchAttention(0, "class"), images=images)
    assert torch.equal(tokens.signal(PatchAttention(0, "class")), expected[PatchAttention(0, "class")])
    assert cut is not None and cut.valid.sum(1).tolist() == [8, 8, 4]


def test_only_signals_that_a_later_cut_reads_go_along(make):
    early, late = PatchAttention(0, "class"), PatchAttention(1, "class")
    seen: list[list[Signal]] = []

    def cut_to(keep: int, *needs: Signal) -> Select:
        def choose(tokens: Tokens, count: Tensor) -> Tensor:
            assert all(tokens.signal(signal).shape[-1] == tokens.x.shape[1] for signal in needs)
            return tokens.valid & (tokens.valid.cumsum(1) <= count[:, None])

        return Select(Budget(tokens=keep), Selector(choose, needs))

    program: Program = ((vit_after(0), cut_to(8, early)), (vit_after(1), cut_to(4, early, late)))
    encoder = make("timm")
    with under(encoder, program) as engine:
        watch = lambda module, args: seen.append(sorted(engine.now.signals, key=repr))  # noqa: E731
        for number in (1, 2):
            encoder.blocks[number].register_forward_pre_hook(watch)
        encode(engine, pictures())
    assert seen == [[early], []]


def test_views_of_one_image_share_its_budget(make):
    counts: list[list[int]] = []

    def choose(tokens: Tokens, count: Tensor) -> Tensor:
        counts.append(count.tolist())
        return tokens.valid & (tokens.valid.cumsum(1) <= count[:, None])

    encoder, real = make("timm"), torch.ones(3, 16, dtype=torch.bool)
    real[2, 8:] = False
    with under(encoder, ((VIT_OUT, Select(Budget(tokens=6), Selector(choose))),)) as engine:
        engine.begin(lambda: torch.arange(3), torch.tensor([0, 1, 1]), real)
        engine.finish(engine.encoder(pictures(3)).tokens)
    assert counts == [[6, 4, 2]]


@pytest.mark.parametrize("name", ["timm", "clip"])
def test_a_cut_that_keeps_all_changes_no_bit(make, name):
    encoder, images = make(name), pictures()
    everything = Selector(lambda tokens, count: tokens.valid)
    program: Program = ((vit_mid(0), Select(ALL, everything, exact=False)), (vit_after(2), Select(ALL, everything)))
    tokens, cut = run(encoder, program, images)
    assert cut is None and torch.equal(tokens, encoder(images).tokens)


# What is left behind


def traces(encoder: Any) -> list[Any]:
    hooks = [h for m in encoder.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    own = [name for m in encoder.modules() for name in ("forward", "gradient_checkpointing") if name in vars(m)]
    return [*hooks, *own, *range(torch._C._len_torch_function_stack())]


class Oops(Exception):
    pass


def fail(*args: Any) -> Any:
    raise Oops


@pytest.mark.parametrize("where", ["choose mid", "choose after", "choose out", "reduce", "mlp", "encoder", "none"])
@pytest.mark.parametrize("name", ["timm", "clip"])
def test_nothing_is_left_behind_even_after_an_error(make, where, name):
    encoder, images = make(name), pictures()
    bare, before = encoder(images).tokens, traces(encoder)
    broken, good = Selector(fail), Selector(positive)
    site = {"choose mid": vit_mid(1), "choose out": VIT_OUT}.get(where, vit_after(1))
    selector = broken if where.startswith("choose") else good
    if where == "reduce":
        selector = Selector(positive, (), fail)
    program: Program = (*merging(0), (site, Select(ALL, selector, exact=False)))
    with under(encoder, program) as engine:
        failing = {"mlp": encoder.blocks[0].mlp, "encoder": encoder.blocks[1]}.get(where)
        handle = None if failing is None else failing.register_forward_pre_hook(fail)
        if where == "none":
            encode(engine, images)
        else:
            with pytest.raises(Oops):
                encode(engine, images)
        if handle is not None:
            handle.remove()
        assert torch.equal(encoder(images).tokens, bare)  # a pass of its own is none of the program's
    assert traces(encoder) == before
    assert torch.equal(encoder(images).tokens, bare)


def test_attach_leaves_nothing_behind(make_model, batch):
    model, inputs = make_model(class_token=True, blocks=2), batch("t#t")
    bare, before = model(inputs).hidden, traces(model.vision)
    with pytest.raises(Oops), attach(model, ((vit_after(0), Select(ALL, Selector(fail), exact=False)),)):
        model(inputs)
    assert traces(model.vision) == before and torch.equal(model(inputs).hidden, bare)


# Gradient checkpointing


def gradients(encoder: Any, program: Program, batches: list[Tensor]) -> list[Tensor]:
    """Gradients of a sum over several passes, of which none is finished before the last has begun."""
    encoder.zero_grad()
    encoder.train()
    total = torch.zeros((), dtype=torch.float64)
    with under(encoder, program) as engine:
        for images in batches:
            tokens, cut = encode(engine, images)
            features = tokens if cut is None else cut.features.masked_fill(~cut.valid[..., None], 0)
            total = total + features.sin().sum()
        total.backward()
    return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]


PROGRAMS: dict[str, Program] = {
    "ragged": (ragged(0), ragged(2)),
    "mid": (ragged(1, mid=True), ragged(2)),
    "merged": merging(0, 2),
}


CHECKPOINTED = [  # encoder, program, the older kind of checkpointing
    *(("timm", program, reentrant) for program in PROGRAMS for reentrant in (False, True)),
    *(("clip", program, reentrant) for program in PROGRAMS for reentrant in (False, True)),
    ("timm registers", "mid", False),
    ("dinov2", "merged", False),
]


@pytest.mark.parametrize(("name", "program", "reentrant"), CHECKPOINTED)
def test_recomputed_blocks_give_the_same_gradients(make, name, program, reentrant, monkeypatch):
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: reentrant)
    encoder, batches = make(name), [pictures(3), pictures(5)[3:]]
    plain = gradients(encoder, PROGRAMS[program], batches)
    if name in CONFIGS:
        encoder.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:  # which has no gradient unless an input of a block has one
            encoder.model.enable_input_require_grads()
    else:
        encoder.model.set_grad_checkpointing(True)
    again = gradients(encoder, PROGRAMS[program], batches)
    assert len(plain) == len(again) > 20
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_blocks_are_recomputed_at_all(make):
    encoder, passes = make("timm"), []
    encoder.model.set_grad_checkpointing(True)
    encoder.blocks[2].mlp.register_forward_pre_hook(lambda *args: passes.append(1))
    gradients(encoder, PROGRAMS["mid"], [pictures()])
    assert len(passes) == 2


def test_what_was_remembered_goes_with_the_graph(make):
    encoder = make("timm")
    encoder.model.set_grad_checkpointing(True)
    encoder.train()
    with under(encoder, PROGRAMS["ragged"]) as engine:
        tokens, cut = encode(engine, pictures())
        assert len(engine._entered) > 0
        del tokens, cut
        assert len(engine._entered) == 0


def test_a_recomputed_block_whose_input_was_moved_is_refused(make):
    encoder = make("timm")
    encoder.model.set_grad_checkpointing(True)
    encoder.train()
    with (
        under(encoder, PROGRAMS["ragged"]) as engine,
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    ):
        tokens, _ = encode(engine, pictures())
        with pytest.raises(ModelError, match=r"^vit: block 3 is run again in the backward pass on a copy of its input"):
            tokens.sum().backward()


# What is refused


def facts_like(encoder: Any) -> Vision:
    blind = "" if encoder.blocks else f"{type(encoder).__name__} has no attention blocks"
    return Vision(encoder.depth, len(encoder.blocks), encoder.output, encoder.class_token, encoder.cuts, blind)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["timm", "clip"])
@pytest.mark.parametrize("program", [(ragged(0), ragged(2)), None], ids=["cut", "read"])
def test_attention_that_cannot_be_seen_is_refused(make, name, program):
    encoder = make(name)
    if name == "timm":
        for block in encoder.blocks:
            block.attn.fused_attn = False
    else:
        encoder.model.set_attn_implementation("eager")
    if program is not None and name == "clip":
        tokens, cut = run(encoder, program, pictures(3))  # padding is in the mask: eager attention has it too
        assert cut is not None
        alone, _ = run(encoder, program, pictures(3)[:1])
        torch.testing.assert_close(tokens[0, cut.valid[0]], alone[0], rtol=0, atol=1e-6)
        return
    with pytest.raises(ModelError) as error:
        if program is None:
            read(encoder, PatchAttention(1, "all"))
        else:
            run(encoder, program, pictures(3))
    assert one_line(error).startswith("vit: block 1 ") and "found 0 (fused attention off" in one_line(error)


def test_a_block_that_norms_after_attention_cannot_be_cut_in_the_middle():
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0, block_fn=ResPostBlock
    )
    encoder = TimmEncoder(model, SPEC)
    with pytest.raises(ModelError) as error, under(encoder, merging(1)):
        pass
    assert one_line(error) == "vit.mid: expected blocks of attention, then norm and MLP; found ResPostBlock"
    assert traces(encoder) == []


def with_vision(model: Any, encoder: Any) -> Any:
    """The facts of a model, with another encoder."""
    return model.facts._replace(vision=facts_like(encoder))


def test_encoders_whose_tokens_cannot_go(make, make_model):
    swin = SwinTransformer(img_size=32, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
    model = make_model(class_token=True)
    cases = {
        "SwinTransformer is not a plain vision transformer": TimmEncoder(swin, SPEC),
        "dinov3_vit gives its blocks rotary positions": make("dinov3"),
        "OpenCLIP hands its features over as a grid": make("openclip"),
    }
    for why, encoder in cases.items():
        with pytest.raises(ModelError) as error:
            check((ragged(0),), with_vision(model, encoder))
        assert one_line(error) == f"vit.after[0]: tokens cannot go inside this vision encoder: {why}"
    with pytest.raises(ModelError) as error:
        encoder_of(with_vision(model, cases["SwinTransformer is not a plain vision transformer"]), "x").block(None, "x")
    assert one_line(error) == "x: it reads attention in the vision encoder, but TimmEncoder has no attention blocks"


@pytest.mark.parametrize("site", [vit_after(4), vit_mid(4)])
def test_a_block_that_does_not_exist(make_model, site):
    model = make_model(class_token=True, blocks=4)
    with pytest.raises(ModelError) as error, attach(model, ((site, Select(ALL, Selector(positive))),)):
        pass
    assert one_line(error) == f"{site}: expected a block of the vision encoder, 0..3; found 4"


def test_a_signal_of_a_later_block(make_model):
    model = make_model(class_token=True, blocks=4)
    selector = Selector(positive, (PatchAttention(2, "class"),))
    with pytest.raises(ModelError) as error, attach(model, ((vit_after(1), Select(ALL, selector)),)):
        pass
    assert one_line(error).startswith("vit.after[1]: it asks for PatchAttention(layer=2")


def test_a_folding_connector(make_model):
    model = make_model(class_token=True, blocks=2, shuffle=2)
    with pytest.raises(ModelError) as error, attach(model, (ragged(0),)):
        pass
    assert "prune at llm.in instead" in one_line(error)
