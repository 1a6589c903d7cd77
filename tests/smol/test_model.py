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


def test_questions_are_padded_on_the_left(smol):
    inputs = smol[1](text=["a b c d e f", "a"], padding=True, return_tensors="pt", add_special_tokens=False)
    assert inputs["attention_mask"][1].tolist() == [0, 0, 0, 0, 0, 1]


def test_the_image_token_is_never_said_and_takes_sixteen_places(smol):
    model, processor = smol
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    ids = ask(model, processor, "What is this?", Image.new("RGB", (SIDE, SIDE), "white"))
    assert (ids == image).sum() == (SIDE // 32) ** 2
    head = model.get_output_embeddings().weight
    twin = processor.tokenizer.convert_tokens_to_ids("<reponame>")
    assert torch.equal(head[image], head[twin])


@pytest.fixture(scope="module")
def language():
    files = {p.use: fetch.cache_dir() / "smol" / "downloads" / p.file for p in fetch.PACKAGES}
    return read_language_model(files["language"])


def test_every_weight_of_the_language_model_is_the_packages_and_its_tokens_too(smol, language):
    model, processor = smol
    theirs, tokenizer = language
    ours = dict(model.model.language_model.named_parameters())
    for name, value in theirs.model.named_parameters():
        part = ours[name][tuple(slice(size) for size in value.shape)]
        assert torch.equal(part, value.half().float()), name
    assert tokenizer("Hello there")["input_ids"] == processor.tokenizer("Hello there")["input_ids"]


def test_texts_are_answered_as_by_the_language_model_as_it_came(smol, language):
    model, processor = smol
    theirs, _ = language
    theirs = theirs.half().float()  # as the folder keeps it
    for question in ("What is 3 plus 4?", "What is the capital of Kenya?", "Name a bird that cannot fly."):
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": question}]}], add_generation_prompt=True
        )
        inputs = processor(text=text, return_tensors="pt", add_special_tokens=False)
        own = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        as_it_came = theirs.generate(
            **inputs, max_new_tokens=16, do_sample=False, pad_token_id=2, eos_token_id=2
        )
        assert torch.equal(own, as_it_came), question


def test_concepts_are_many_have_pictures_and_no_name_twice():
    concepts = load_concepts()
    assert len(concepts) >= 1000 and len({c.name for c in concepts}) == len(concepts)
    for concept in concepts[::50]:
        assert concept.by_role("training") and all(path.exists() for path in concept.pictures.values())
    assert {c.family for c in load_concepts(("flags",))} == {"flags"}
    with pytest.raises(ValueError, match="families has cars"):
        load_concepts(("cars",))
