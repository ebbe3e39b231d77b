"""PaliGemma and PaliGemma 2 against Transformers."""

import inspect
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessor,
)

from vlm.models.errors import ModelError
from vlm.models.mitigators.var import Var
from vlm.models.program.attach import attach
from vlm.models.program.program import attn
from vlm.models.program.signals import Facts


@pytest.fixture(scope="module", params=["gemma", "gemma2"])
def case(request, tiny, make_case):
    tokenizer = tiny.tokenizer(image_token="<image>")
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer)
    options = tiny.text(head_dim=8, vocab_size=len(tokenizer))
    if request.param == "gemma":
        text: Any = GemmaConfig(**options)
    else:
        # the class had no soft cap on logits in older releases of Transformers, though Gemma 2 has one
        capped = "final_logit_softcapping" in inspect.getsource(PaliGemmaForConditionalGeneration.forward)
        cap = 30.0 if capped else None
        text = Gemma2Config(**options, sliding_window=8, query_pre_attn_scalar=8, final_logit_softcapping=cap)
    config = PaliGemmaConfig(
        vision_config=tiny.siglip(vision_use_head=False),
        text_config=text,
        image_token_id=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    return make_case(config, processor, "<image>", needs_images=True, inside=request.param == "gemma")


def test_paligemma(check, case):
    check(case)


def test_a_suffix_is_causal(case, tiny):
    images, texts = [tiny.noise(1), tiny.noise(2)], ["<image> a b", "<image> c"]
    batch = case.processor(text=texts, images=images, suffix=["d e f", "g"], padding=True, return_tensors="pt")
    labels = batch.pop("labels")
    inputs, real = case.ours.inputs(batch), batch["attention_mask"].bool()
    with torch.no_grad():
        stock = case.stock(**batch).logits
        out = case.ours(inputs, (labels != -100).float())
        assert torch.equal(case.ours.logits(out.hidden)[real], stock[real])
        log_p = stock[:, :-1].log_softmax(-1)
        expected = -log_p.gather(2, labels[:, 1:].clamp_min(0)[..., None])[..., 0][labels[:, 1:] != -100].sum()
        torch.testing.assert_close(out.loss, expected)
        changed = inputs._replace(tokens=inputs.tokens.clone())
        changed.tokens[0, real[0].nonzero().max()] = 5  # the last token of the suffix: no earlier place sees it
        last = int(real[0].nonzero().max())
        assert torch.equal(case.ours(changed).hidden[0, :last][real[0, :last]], out.hidden[0, :last][real[0, :last]])


def test_rules_on_attention_are_refused(case):
    rule = Var().program(Facts(layers=4, width=32))[0][1]
    with pytest.raises(ModelError, match="read in both directions"), attach(case.ours, ((attn(1), rule),)):
        pass
