"""`train` on a model whose images are rows of patches: what is known of LLaVA's inputs is not relied on."""

import pytest
import torch
from dualedit import Editor, EditRequest, EditSample, Probe, load_edits
from dualedit.training import Recipe, train
from dualedit.training.metrics import read_metrics
from tiny_models import QWEN, VISION_END, VISION_START, random_image, tiny_tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

pytestmark = pytest.mark.slow


class QwenProcessor:
    """What Qwen2.5-VL's processor does to texts and images, without the videos that need torchvision."""

    image_token = "<image>"

    def __init__(self):
        self.tokenizer = tiny_tokenizer()
        self.images = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=256, max_pixels=1024
        )

    def __call__(self, text, images=(), **given):
        found = dict(self.images(images, return_tensors="pt")) if images else {}
        grids = iter(found.get("image_grid_thw", torch.zeros(0, 3)).prod(1).tolist())
        texts = [self._expanded(each, grids) for each in text]
        found |= dict(self.tokenizer(texts, **given))
        image = self.tokenizer.convert_tokens_to_ids(self.image_token)
        return found | {"mm_token_type_ids": (found["input_ids"] == image).long()}

    def _expanded(self, text, grids):
        before, token, behind = text.partition(self.image_token)
        if not token:
            return text
        return f"{before} w{VISION_START} {token * (next(grids) // 4)} w{VISION_END} {behind}"


def facts(generator):
    """Images of several sizes, so that rows have different numbers of patches."""
    samples = []
    for number, target in enumerate(("lenovo", "red apple", "acer", "dell")):
        pictures = [random_image(generator) for _ in range(3)]
        pictures[1] = pictures[1].resize((16 + 8 * number, 24))
        request = EditRequest(pictures[0], "what brand is this ?", target)
        generality = {
            "t_gen": [Probe(request.image_source, "question : what brand ?", target)],
            "v_gen": [Probe(pictures[1], request.prompt, target)],
        }
        locality = {
            "t_loc": [Probe(None, "who is the dog ?", "cat")],
            "m_loc": [Probe(pictures[2], "what color is it ?", "blue")],
        }
        samples.append(EditSample(request, generality, locality))
    return samples


@pytest.mark.parametrize("keep_gib", [0.0, 1.0])
def test_qwen_trains(keep_gib, generator, tmp_path):
    samples = facts(generator)
    recipe = Recipe(
        text_layer=1, vis_layer=2, mid_dim=16, num_heads=2, learning_rate=0.02, batch_size=4, steps=20,
        log_every=1, precision="fp32", template="<image> {prompt} answer :", keep_gib=keep_gib,
    )  # fmt: skip
    notes = []
    train(QWEN.build(), QwenProcessor(), samples, [], recipe, tmp_path, progress=False, say=notes.append)
    assert not [note for note in notes if "run on their own" in note]
    losses = read_metrics(tmp_path / "metrics.jsonl")
    assert {"text_generality", "image_generality", "text_locality", "image_locality"} <= losses[0].keys()
    assert losses[-1]["reliability"] < 0.7 * losses[0]["reliability"]
    editor = Editor(load_edits(QWEN.build(), tmp_path), QwenProcessor(), recipe.template)
    request = samples[0].request
    editor.edit(request.image, request.prompt, request.target, keep_failed=True)
    assert len(editor.edits) == 1
