"""LLaVA-1.5 against Transformers."""

from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessor, LlamaConfig, LlavaConfig, LlavaProcessor

from vlm.models.mitigators.act import Act
from vlm.models.mitigators.gift import Gift
from vlm.models.mitigators.pai import Pai
from vlm.models.mitigators.vhr import Vhr
from vlm.models.mitigators.vista_vsv import Vistavsv
from vlm.models.mitigators.vti import Vti
from vlm.models.program.artifact import Calibration, Shelf, fingerprint, write
from vlm.models.program.attach import attach
from vlm.models.program.decode import generate
from vlm.models.program.tune import Described

MITIGATORS: dict[str, Any] = {
    "pai": Pai(alpha=0.9, layers=(0, 1)),
    "act": Act(beta=0.1, threshold=0.5, scaled=True, calibration=None, layers=(0, 1)),
    "vhr": Vhr(gain=2.0, layers=(0, 1)),
    "vista_vsv": Vistavsv(strength=0.5),
    "gift": Gift(strength=4.0, look=(0, 0), layers=(1, 1)),
}


@pytest.fixture(scope="module")
def case(tiny, make_case):
    tokenizer = tiny.tokenizer("<image>")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(images, tokenizer, 8, "default", num_additional_image_tokens=1)
    text = LlamaConfig(**tiny.text())
    config = LlavaConfig(vision_config=tiny.clip(), text_config=text, image_token_id=processor.image_token_id)
    return make_case(config, processor, "<image>")


def test_llava(check, case):
    check(case)


def test_the_grid_of_an_image(case):
    layout = case.ours.prefill(case.ours.inputs(case.batch(["a#b"])))[1].run.layouts[0]
    assert layout.row[0].tolist() == [-1, *[r for r in range(4) for _ in range(4)], -1]
    assert layout.col[0].tolist() == [-1, *[0, 1, 2, 3] * 4, -1]


def named(model: Any) -> Any:
    """The model with words: every letter a word of content."""
    model.tokenize = lambda text: [4 + ord(letter) - ord("a") for letter in text]
    model.detokenize = lambda ids: " ".join(f"word{token}" for token in ids)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", MITIGATORS)
def test_mitigators_act_and_a_batch_equals_single_samples(case, name):
    model = named(case.ours)
    rows = ["ab#cdef", "#ghijk"]
    program = MITIGATORS[name].program(model.facts)
    plain = model.prefill(model.inputs(case.batch(rows)))[0]
    options: Any = {"max_new_tokens": 4, "stop": 2}
    with attach(model, program):
        assert not torch.allclose(model.prefill(model.inputs(case.batch(rows)))[0], plain, atol=1e-3)
        together = generate(model, model.inputs(case.batch(rows)), **options)
        assert together == [generate(model, model.inputs(case.batch([row])), **options)[0] for row in rows]
    assert torch.equal(model.prefill(model.inputs(case.batch(rows)))[0], plain)


@torch.no_grad()
def test_vti_from_its_calibration_to_answers(case, tmp_path):
    model = named(case.ours)
    method, rows = Vti(masks=2, mask_ratio=0.5, calibration=Calibration(str(tmp_path / "v"))), ["ab#cd", "#ghij"]
    inputs = model.inputs(case.batch(rows))

    class Material:
        described = (Described(inputs, ["klm", "no"], ["kpm", "q"]),)

    tensors, _ = method.calibrate(model, Material(), lambda *at: None)
    write(tmp_path / "v", tensors, {"method": "vti", "weights": fingerprint(model)})
    model.shelf = Shelf(lambda *_: tmp_path / "v", lambda: fingerprint(model))
    plain = model.prefill(inputs)[0]
    with attach(model, method.program(model.facts)):
        both = model.prefill(inputs)[0]
        for number, row in enumerate(rows):
            alone = model.prefill(model.inputs(case.batch([row])))[0][0]
            torch.testing.assert_close(both[number], alone, rtol=0, atol=2e-4)
    assert not torch.allclose(both, plain, atol=1e-3)
