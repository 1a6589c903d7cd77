"""The assembled model; needs it in the cache (`dualedit fetch smol`)."""

import pytest
import torch
from dualedit.smol import fetch, is_fetched, load_concepts, load_smol, smol_folder
from dualedit.smol.model import SIDE, read_language_model
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_fetched(), reason="smol is not in the cache: `dualedit fetch smol` brings it"),
]


@pytest.fixture(scope="module")
def smol():
    return load_smol()


def ask(model, processor, question, picture=None):
    content = ([{"type": "image"}] if picture else []) + [{"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(
        text=text, images=[picture] if picture else None, return_tensors="pt", add_special_tokens=False
    )
    with torch.inference_mode():
        return model.generate(**inputs, max_new_tokens=8, do_sample=False)


def test_an_ordinary_folder_with_a_picture_and_without(smol):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = smol_folder()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    picture = Image.new("RGB", (300, 200), "red")
    for given in (picture, None):
        first = ask(model, processor, "What is this?", given)
        assert torch.equal(first, ask(*smol, "What is this?", given))


def test_the_image_token_is_never_said_and_takes_sixteen_places(smol):
    model, processor = smol
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    ids = ask(model, processor, "What is this?", Image.new("RGB", (SIDE, SIDE), "white"))
    assert (ids == image).sum() == (SIDE // 32) ** 2
    head = model.get_output_embeddings().weight
    twin = processor.tokenizer.convert_tokens_to_ids("<reponame>")
    assert torch.equal(head[image], head[twin])


def test_layers_that_are_not_trained_are_those_of_the_package(smol):
    model, _ = smol
    files = {p.use: fetch.cache_dir() / "smol" / "downloads" / p.file for p in fetch.PACKAGES}
    language, tokenizer = read_language_model(files["language"])
    ours, theirs = model.model.language_model.layers[0], language.model.layers[0]
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b.half().float()), name
    assert tokenizer("Hello there")["input_ids"] == smol[1].tokenizer("Hello there")["input_ids"]


def test_concepts_are_many_have_pictures_and_no_name_twice():
    concepts = load_concepts()
    assert len(concepts) >= 1000 and len({c.name for c in concepts}) == len(concepts)
    for concept in concepts[::50]:
        assert concept.by_role("training") and all(path.exists() for path in concept.pictures.values())
    assert {c.family for c in load_concepts(("flags",))} == {"flags"}
    with pytest.raises(ValueError, match="families has cars"):
        load_concepts(("cars",))
