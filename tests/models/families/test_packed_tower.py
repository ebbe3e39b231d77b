"""Cuts in the vision encoders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, against the encoder written out image by image."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from vlm.models.errors import ModelError
from vlm.models.mitigators.vti import Vti
from vlm.models.pretrained import PretrainedVlm
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.clip import clip_relevance
from vlm.models.program.decode import generate
from vlm.models.program.program import VIT_OUT, Program, Select, Selector, Tokens, check, vit_after
from vlm.models.program.select import even_stride, top
from vlm.models.program.signals import PatchAttention, PatchKeys
from vlm.models.pruners.flowcut import Flowcut
from vlm.models.pruners.tome import Tome
from vlm.models.pruners.visionzip import Visionzip

DEPTH, HEADS, WIDTH, SIDE = 6, 4, 32, 3  # SIDE of a window, in groups of 2x2 patches
FULL = {"qwen2_5_vl": (2, 5)}  # blocks that attend to the whole image, where not all do
GRIDS = [(5, 8), (9, 4), (4, 11)]  # rows and columns of groups, of images 0, 1, 2
ROWS = ("ab#c", "de", "#fghij#k")
HALF = Budget.parse("50%")
VISION: dict[str, Any] = {"patch_size": 4, "spatial_merge_size": 2, "depth": DEPTH, "num_heads": HEADS}
IMAGE, START, END = 100, 101, 102


def config_of(kind: str) -> Any:
    text = {
        "vocab_size": 120,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.25,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }
    tokens = {"image_token_id": IMAGE, "video_token_id": 99, "vision_start_token_id": START, "vision_end_token_id": END}
    if kind == "qwen2_vl":
        vision = VISION | {"embed_dim": WIDTH, "hidden_size": 32, "mlp_ratio": 2}
        return Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    if kind == "qwen2_5_vl":
        window = {"window_size": 8 * SIDE, "fullatt_block_indexes": [*FULL[kind]], "out_hidden_size": 32}
        vision = VISION | window | {"hidden_size": WIDTH, "intermediate_size": 48}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    more = {"num_position_embeddings": 64, "deepstack_visual_indexes": [1, 3], "out_hidden_size": 32}
    vision = VISION | more | {"hidden_size": WIDTH, "intermediate_size": 48}
    return Qwen3VLConfig(text_config=text | {"head_dim": 8}, vision_config=vision, **tokens)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def model(request: pytest.FixtureRequest) -> PretrainedVlm:
    """Weights so large that attention is far from even; double precision."""
    torch.manual_seed(0)
    stock: Any = AutoModelForImageTextToText.from_config(config_of(request.param))
    for name, weight in stock.model.visual.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.25)
        elif name.endswith("bias"):
            nn.init.normal_(weight, std=0.1)
    return PretrainedVlm(stock).double().eval()


def pixels_of(image: int) -> Tensor:
    rows, cols = GRIDS[image]
    return torch.randn(4 * rows * cols, 3 * 2 * 16, dtype=torch.float64, generator=torch.Generator().manual_seed(image))


def inputs_of(model: PretrainedVlm, rows: Sequence[str] = ROWS, images: Sequence[int] = (0, 1, 2)) -> Any:
    """Rows of letters and images (#, in their order), padded on the left."""
    left, texts = list(images), []
    for row in rows:
        tokens: list[int] = []
        for mark in row:
            if mark == "#":
                rows_, cols = GRIDS[left.pop(0)]
                tokens += [START, *[IMAGE] * (rows_ * cols), END]
            else:
                tokens.append(ord(mark) - 90)
        texts.append(tokens)
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    batch = {"input_ids": ids, "attention_mask": mask}
    if shown := images[: len(images) - len(left)]:
        batch["pixel_values"] = torch.cat([pixels_of(image) for image in shown])
        batch["image_grid_thw"] = torch.tensor([[1, 2 * GRIDS[n][0], 2 * GRIDS[n][1]] for n in shown])
    return model.inputs(batch)


def kept_places(layout: Any, image: int) -> list[int]:
    """Raster numbers of the tokens that are left of an image of the batch."""
    mine = layout.visual & (layout.image == image)
    return (layout.row[mine] * GRIDS[image][1] + layout.col[mine]).tolist()


class Seen(NamedTuple):
    """Of one block and one image: queries, keys, values [heads, patches, dim], and what a patch may attend to."""

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor


class Written:
    """The encoder on one image written out: patches in raster order of their groups, attention with explicit masks."""

    def __init__(self, model: PretrainedVlm, image: int) -> None:
        self.kind, self.tower = model.model.config.model_type, model.model.model.visual
        rows, cols = GRIDS[image]
        row, col = torch.meshgrid(torch.arange(2 * rows), torch.arange(2 * cols), indexing="ij")
        # [patches], group after group
        grouped = [x.view(rows, 2, cols, 2).transpose(1, 2).reshape(-1) for x in (row, col)]
        self.window = (grouped[0] // 2 // SIDE) * 100 + grouped[1] // 2 // SIDE
        dim = WIDTH // HEADS
        speed = 1.0 / 10000.0 ** (torch.arange(0, dim // 2, 2).float() / (dim // 2))
        self.angle = torch.cat([x[:, None] * speed for x in grouped], 1).repeat(1, 2)  # [patches, dim]
        self.x = self.tower.patch_embed(pixels_of(image))
        if self.kind == "qwen3_vl":  # learned positions, taken from the encoder's own first block on this image alone
            entered: list[Tensor] = []
            handle = self.tower.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
            self.tower(pixels_of(image), torch.tensor([[1, 2 * rows, 2 * cols]]))
            handle.remove()
            [self.x] = entered
        self.left = list(range(rows * cols))
        self.deep: list[tuple[list[int], Tensor]] = []

    def block(self, number: int) -> Seen:
        block, patches = self.tower.blocks[number], [4 * g + i for g in self.left for i in range(4)]
        q, k, v = (
            part.unflatten(1, (HEADS, -1)).transpose(0, 1) for part in block.attn.qkv(block.norm1(self.x)).chunk(3, 1)
        )
        cos, sin = self.angle[patches].cos(), self.angle[patches].sin()
        half = q.shape[2] // 2
        # in single precision, as Transformers rotates
        turn = lambda t: (t * cos + torch.cat([-t[..., half:], t[..., :half]], 2) * sin).double()  # noqa: E731
        q, k = turn(q.float()), turn(k.float())
        visible = torch.ones(len(patches), len(patches), dtype=torch.bool)
        if number not in FULL.get(self.kind, (number,)):
            visible = self.window[patches][:, None] == self.window[patches]
        weights = (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).masked_fill(~visible, -math.inf).softmax(-1)
        self.x = self.x + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
        self.x = self.x + block.mlp(block.norm2(self.x))
        return Seen(q, k, v, visible)

    def cut(self, kept: Sequence[int]) -> None:
        """Keep the groups of these numbers among those that are left."""
        self.x = self.x.view(-1, 4, WIDTH)[list(kept)].flatten(0, 1)
        self.left = [self.left[n] for n in kept]

    def earlier(self, level: int) -> None:
        merged = self.tower.deepstack_merger_list[level](self.x)
        self.deep.append((list(self.left), merged))


def by_groups(value: Tensor) -> Tensor:
    return value.view(-1, 4).mean(1)


def best(score: Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda n: (-float(score[n]), n))[:count])


@torch.no_grad()
def flowcut_by_hand(model: PretrainedVlm, image: int, keep: int, last: int) -> tuple[Written, list[int]]:
    """FlowCut with its last cut after block ``last``; the number of groups after each block too."""
    written, total, counts = Written(model, image), None, []
    for number in range(DEPTH):
        seen = written.block(number)
        row = (seen.q.mean(1, keepdim=True) @ seen.k.transpose(1, 2) * seen.q.shape[2] ** -0.5).softmax(-1)[:, 0]
        score = by_groups(row.mean(0) * seen.v.mean(0).abs().sum(1))
        total = score if total is None else 0.5 * total + 0.5 * score
        before = last - number
        if before >= 0 and before % 2 == 0:
            share = by_groups(row.mean(0))
            share = share / share.sum()
            n = len(written.left)
            rho = float(-(share * share.log()).sum()) / math.log(n)
            excess = n - keep
            remove = excess if before == 0 else round(excess / math.sqrt(before) * (1 - rho**2))
            kept = best(total, n - min(remove, excess))
            written.cut(kept)
            total = total[kept]
        counts.append(len(written.left))
        if written.kind == "qwen3_vl" and number in (1, 3):
            written.earlier((1, 3).index(number))
    return written, counts


@pytest.mark.parametrize(("form", "last"), [("llava", DEPTH - 2), ("qwen", DEPTH - 1)])
def test_flowcut_equals_the_encoder_written_out(model, form, last):
    method = Flowcut(Budget(tokens=9 if form == "llava" else 5), form=form, position="keep")
    keep, inputs = 9 if form == "llava" else 10, inputs_of(model)
    program = tuple((site, op) for site, op in method.program(model.facts) if site.name == "vit.after")
    assert [site.layer for site, _ in program] == list(range(last % 2, last + 1, 2))
    with torch.no_grad(), attach(model, program):
        pictures, out = model.encode(inputs), model(inputs)
    traces = []
    for image, picture in enumerate(pictures):
        written, counts = flowcut_by_hand(model, image, keep, last)
        assert kept_places(out.layout, image) == written.left and len(written.left) == keep
        assert picture.kept is not None and picture.kept.nonzero()[:, 0].tolist() == written.left
        expected = written.tower.merger(written.x)
        torch.testing.assert_close(picture.features[written.left], expected, rtol=0, atol=1e-9)
        for (left, values), found in zip(written.deep, picture.deep, strict=True):
            torch.testing.assert_close(found[left], values, rtol=0, atol=1e-9)
            assert set(written.left) <= set(left)
        assert not picture.features[~picture.kept].any()
        traces.append(counts)
    assert any(n > count > keep for trace in traces for n, count in zip((40, 36, 44), trace, strict=False))
    assert len({*map(tuple, traces)}) == 3  # each image goes its own way


def received(seen: Seen) -> Tensor:
    """What each patch gets from all that attend to it, divided by how many do."""
    weights = (seen.q @ seen.k.transpose(1, 2) * seen.q.shape[2] ** -0.5).masked_fill(~seen.visible, -math.inf)
    return weights.softmax(-1).sum(1) / seen.visible.sum(0)


def test_signals_are_those_of_the_blocks_after_a_cut(model):
    """Of a block inside windows and of one over the whole image, before and behind a cut that empties windows."""
    signals = [PatchAttention(0, "all"), PatchAttention(2, "all"), PatchAttention(3, "all"), PatchKeys(3)]
    signals.append(PatchAttention(3, "mean"))
    found: list[list[Tensor]] = []

    def first(tokens: Tokens, count: Any) -> Any:  # the right columns, and every other one of the rest
        return tokens.valid & ((tokens.col > 2) | ((tokens.row + tokens.col) % 2 == 0)) & (tokens.row < 7)

    def look(tokens: Tokens, count: Any) -> Any:
        found.append([tokens.signal(signal) for signal in signals])
        return tokens.valid

    early = (vit_after(1), Select(HALF, Selector(first), exact=False))
    late = (vit_after(4), Select(HALF, Selector(look, tuple(signals)), exact=False))
    with torch.no_grad(), attach(model, (early, late)):
        pictures = model.encode(inputs_of(model))
        for image, picture in enumerate(pictures):
            written, expected = Written(model, image), {}
            for number in range(DEPTH):
                seen = written.block(number)
                expected[number] = seen, list(written.left)
                if number == 1:
                    cols = GRIDS[image][1]
                    places = [(g // cols, g % cols) for g in written.left]
                    written.cut([n for n, (r, c) in enumerate(places) if (c > 2 or (r + c) % 2 == 0) and r < 7])
            torch.testing.assert_close(
                picture.features[written.left], written.tower.merger(written.x), rtol=0, atol=1e-9
            )
            for signal, value in zip(signals, found[0], strict=True):
                seen, left = expected[signal.layer]
                if isinstance(signal, PatchKeys):
                    wanted = seen.k.unflatten(1, (-1, 4)).mean(2)
                elif signal.who == "mean":
                    row = seen.q.mean(1, keepdim=True) @ seen.k.transpose(1, 2) * seen.q.shape[2] ** -0.5
                    wanted = row.softmax(-1)[:, 0].unflatten(1, (-1, 4)).mean(2)
                else:
                    wanted = received(seen).unflatten(1, (-1, 4)).mean(2)
                wanted = wanted[:, [left.index(g) for g in written.left]]
                torch.testing.assert_close(value[image, :, : len(written.left)], wanted, rtol=0, atol=1e-9)


METHODS = [
    Flowcut(HALF, position="keep"),
    Flowcut(Budget(tokens=7), position="keep"),
    Flowcut(Budget.parse("20%"), form="qwen", position="keep"),
    Visionzip(HALF, attention="received", position="keep"),
]


@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_budget_and_the_same_alone_as_in_a_batch(model, method):
    inputs = inputs_of(model)
    before = [rows * cols for rows, cols in GRIDS]
    with torch.no_grad(), attach(model, method.program(model.facts)):
        together = model(inputs).layout
        last, stream = model.prefill(inputs)
        counts = stream.run.visual_tokens(4)
        after = model.step(stream, torch.tensor([5, 6, 7]))
        wanted = [method.keep.of(n) for n in before]
        if getattr(method, "form", "") == "qwen":
            wanted = [method.keep.of(before[0]), method.keep.of(before[1] + before[2])]
            assert together.visual.sum(1).tolist() == [wanted[0], 0, wanted[1]]
            assert counts[0] > counts[3]
        else:
            assert [len(kept_places(together, n)) for n in range(3)] == wanted
        for row, images in ((0, (0,)), (2, (1, 2))):
            alone, one = model.prefill(inputs_of(model, [ROWS[row]], images))
            own, visual, mine = one.run.last, one.run.last.visual[0], together.visual[row]
            assert torch.equal(own.row[0][visual], together.row[row][mine])
            assert torch.equal(own.col[0][visual], together.col[row][mine])
            torch.testing.assert_close(alone[0], last[row], rtol=0, atol=1e-8)
            step = model.step(one, torch.tensor([5 + row]))
            torch.testing.assert_close(step[0], after[row], rtol=0, atol=1e-8)


def test_kept_tokens_have_the_positions_of_their_places(model):
    inputs = inputs_of(model)
    with torch.no_grad():
        whole = model(inputs).layout
        with attach(model, Flowcut(HALF, position="keep").program(model.facts)):
            cut = model(inputs).layout
    for row in range(3):
        real = cut.valid[row]
        assert torch.equal(cut.axes[row, real], whole.axes[row, cut.source[row, real]])


def test_everything_kept_is_the_bare_model_to_the_bit(model):
    inputs, everything = inputs_of(model), Budget.parse("100%")
    flow = Flowcut(HALF, position="keep").program(model.facts)
    sites = [site for site, _ in flow]
    programs: list[Program] = [
        tuple((site, Select(everything, even_stride())) for site in [*sites, VIT_OUT]),
        tuple((site, Select(everything, op.selector, exact=False)) for site, op in flow),  # chooses, and drops none
        Flowcut(everything).program(model.facts),
    ]
    with torch.no_grad():
        plain = model(inputs).hidden
        for program in programs:
            with attach(model, program):
                assert torch.equal(model(inputs).hidden, plain)
        with attach(model, flow):
            assert model(inputs).hidden.shape != plain.shape
        assert torch.equal(model(inputs).hidden, plain)
    tower = model.model.model.visual
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in tower.modules())


def test_a_cut_at_the_output_leaves_what_the_merger_makes_of_it(model):
    inputs, signal = inputs_of(model), PatchAttention(DEPTH - 1, "all")
    selector = Selector(lambda tokens, count: top(tokens.signal(signal).sum(1), tokens.valid, count), (signal,))
    with torch.no_grad():
        whole = model.encode(inputs)
        with attach(model, ((VIT_OUT, Select(HALF, selector)),)):
            cut = model.encode(inputs)
    for before, after in zip(whole, cut, strict=True):
        assert after.kept is not None and int(after.kept.sum()) == len(after.kept) // 2
        torch.testing.assert_close(after.features[after.kept], before.features[after.kept], rtol=0, atol=1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_repeat_their_cuts(model, reentrant):
    if reentrant and model.family.deep:
        pytest.skip("older versions of Transformers cannot checkpoint a bare Qwen3-VL this way")
    inputs = inputs_of(model)
    weights = torch.ones(inputs.tokens.shape, dtype=torch.float64) * inputs.valid
    model.train()
    gradients, layouts, other = [], [], inputs_of(model, ["#a"], [2])
    try:
        for checkpointing in (False, True):
            if checkpointing:
                model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            with attach(model, Flowcut(HALF, form="qwen", position="keep").program(model.facts)):
                output = model(inputs, weights)
                model(other, torch.ones(other.tokens.shape))  # another batch goes through before the gradient
                output.loss.backward()
            layouts.append(output.layout)
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            model.zero_grad(set_to_none=True)
    finally:
        model.model.gradient_checkpointing_disable()
        model.zero_grad(set_to_none=True)
        model.eval()
    assert torch.equal(layouts[0].source, layouts[1].source)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-9)
    reached = [n for n, g in gradients[0].items() if ".visual.blocks." in n and bool(g.abs().sum() > 0)]
    assert len(reached) == sum(".visual.blocks." in n for n, _ in model.named_parameters())


def test_text_alone_trains_between_batches_with_images(model):
    model.train()
    try:
        with attach(model, Flowcut(HALF, position="keep").program(model.facts)):
            for rows in (["ab#c"], ["abc"]):
                inputs = inputs_of(model, rows)
                model(inputs, torch.ones(inputs.tokens.shape, dtype=torch.float64)).loss.backward()
        assert all(p.grad is not None for p in model.model.model.visual.parameters())
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()


def test_generation_goes_on_from_what_was_kept(model):
    inputs = inputs_of(model)
    method = Flowcut(Budget.parse("20%"), form="qwen", position="keep")
    with attach(model, method.program(model.facts)):
        together = generate(model, inputs, max_new_tokens=4, stop=-1)
        alone = [
            generate(model, inputs_of(model, [ROWS[row]], images), max_new_tokens=4, stop=-1)[0]
            for row, images in ((0, (0,)), (1, ()), (2, (1, 2)))
        ]
    assert together == alone and all(len(answer) == 4 for answer in together)


def test_what_cannot_be_is_refused(model, monkeypatch):
    facts = model.facts
    for method, expected in (
        (Flowcut(HALF), "position ids on three axes cannot be counted anew; set position: keep (found reindex)"),
        (Tome(HALF, position="keep"), "vit.mid[0]: patches that the connector merges go together here"),
    ):
        with pytest.raises(ModelError) as error:
            check(method.program(facts), facts)
        assert expected in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ModelError, match="this vision encoder has no class token; set attention: received"):
        Visionzip(HALF).program(facts)
    with pytest.raises(ModelError, match=r"vti.alpha_image: this vision encoder packs images of many sizes"):
        Vti(alpha_text=0.0).program(facts)
    with pytest.raises(ModelError, match=r"cdpruner: relevance: .*; this vision encoder hands over groups of patches"):
        clip_relevance(facts, "nothing", "cdpruner")
    weighed = ((vit_after(0), Select(HALF, even_stride(), weigh=True)),)
    with pytest.raises(ModelError, match=r"vit.after\[0\]: attention of packed pictures cannot weigh"):
        attach(model, weighed).__enter__()
    inputs = inputs_of(model, ["#"], [0])
    frames = inputs._replace(media={**inputs.media, "image_grid_thw": torch.tensor([[2, 10, 8]])})
    program = Flowcut(HALF, position="keep").program(facts)
    with attach(model, program), pytest.raises(ModelError, match=r"expected images of one frame .*; found 2 frames"):
        model.encode(frames)
    monkeypatch.setattr(model.model.model.visual.config, "_attn_implementation", "eager")
    with attach(model, program), pytest.raises(ModelError, match=r"for 160 patches; found 0 .attention implementation"):
        model.encode(inputs)
    assert not any(m._forward_pre_hooks for m in model.model.model.visual.modules())
