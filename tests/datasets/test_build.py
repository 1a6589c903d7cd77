"""`dualedit.datasets.build`: generators, filters, a build that stops half way, and what cannot be used."""

import json
from types import SimpleNamespace

import pytest
import torch
from dualedit.datasets.build import (
    Cache,
    DiffusersPictures,
    Endpoint,
    FromSamples,
    GeneratorFailed,
    LocalTextModel,
    Neighbours,
    PictureFolder,
    Piece,
    TextGenerator,
    Wanted,
    build,
    estimate,
    read_source,
    write_source,
)
from dualedit.datasets.build.answering import Answerer
from dualedit.datasets.build.filters import Hashes, plain, says, why_dropped
from dualedit.datasets.build.language import lines_of
from dualedit.datasets.build.pictures import Index
from dualedit.toy.model import build_tokenizer, load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from PIL import Image
from stub_endpoint import serving
from transformers import LlamaConfig, LlamaForCausalLM

ONLY_TEXT = Wanted(rephrases=3, edit_rephrases=1, other_images=0, look_alikes=0, unrelated_images=0)


def picture(path, seed, size=48):
    """A picture of random blocks."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 255, (6, 6, 3), generator=generator, dtype=torch.uint8).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(blocks).resize((size, size), Image.Resampling.NEAREST)
    image.save(path)
    return image


@pytest.fixture
def source(tmp_path):
    """Three rows with pictures."""
    rows = []
    for number in range(3):
        picture(tmp_path / f"{number}.png", number)
        rows.append(
            {"image": f"{number}.png", "question": f"What is thing {number}?", "answer": "a cup",
             "new_answer": "a lamp", "thing": "a cup"}
        )  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def waits():
    found = []
    return found, found.append


# ---------------------------------------------------------------------- an endpoint


def text_from(server, wait=lambda seconds: None):
    return TextGenerator(Endpoint(server.url, "stub", wait=wait))


def told(samples):
    return [([p.prompt for p in s.generality["t_gen"]], s.rephrases, s.locality) for s in samples]


def test_an_endpoint_that_fails_half_way_loses_nothing(source, tmp_path):
    rows, _ = read_source(source)
    with serving() as server:
        whole = build(rows, [text_from(server)], ONLY_TEXT, None, Cache())
        asked = len(server.requests)
    assert asked == 9 and not whole.short  # three kinds of three rows
    file = tmp_path / "cache.jsonl"
    with serving(lambda number: None if number < 4 else (500, "out of order", {})) as server:
        waited, wait = waits()
        with pytest.raises(
            GeneratorFailed, match=r"line 2 \(1\), near_questions: .*HTTP 500.*run the same again"
        ):
            build(rows, [text_from(server, wait)], ONLY_TEXT, None, Cache(file))
        assert waited == [1.0, 2.0, 4.0] and len(server.requests) == 4 + 4
    costs, cached = estimate(rows, [text_from(server)], ONLY_TEXT, Cache(file))
    assert cached == 4 and costs["endpoint stub"].requests == asked - 4
    with file.open("a") as opened:
        opened.write('{"key": "cut')  # as if it had been stopped while writing
    with serving() as server:
        again = build(rows, [text_from(server)], ONLY_TEXT, None, Cache(file))
        assert len(server.requests) == asked - 4
    assert told(again.samples) == told(whole.samples)


def test_a_busy_endpoint_is_waited_for(source, monkeypatch):
    monkeypatch.setenv("STUB_KEY", "secret")
    row = read_source(source)[0][0]
    plan = {0: (429, "busy", {"Retry-After": "7"}), 1: (200, "half an ans", {})}
    with serving(plan.get) as server:
        waited, wait = waits()
        endpoint = Endpoint(server.url, "stub", "STUB_KEY", wait=wait)
        pieces = TextGenerator(endpoint).make("texts", row, 2, 0)
        assert waited == [7.0, 2.0] and len(pieces) == 2
        assert server.headers[0]["Authorization"] == "Bearer secret"
        assert server.requests[0]["model"] == "stub" and "What is thing 0?" in str(server.requests[0])
    assert endpoint.used == {"requests": 1, "prompt_tokens": 50, "completion_tokens": 100}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, "no", {}), "HTTP 401"),
        ((200, "[]", {}), "without choices"),
        ((200, '{"choices": []}', {}), "without choices"),
    ],
)
def test_an_endpoint_that_refuses_is_not_asked_again(answer, said, source):
    row = read_source(source)[0][0]
    with serving(lambda number: answer) as server:
        with pytest.raises(GeneratorFailed, match=said):
            text_from(server).make("texts", row, 2, 0)
        assert len(server.requests) == 1 and "Authorization" not in server.headers[0]


def test_nobody_answers(source):
    row = read_source(source)[0][0]
    endpoint = Endpoint("http://127.0.0.1:9", "stub", wait=lambda seconds: None)
    with pytest.raises(GeneratorFailed, match="127.0.0.1:9/?v?1? ?.*fails"):
        TextGenerator(endpoint).make("texts", row, 2, 0)
    with pytest.raises(ValueError, match="url='somewhere'"):
        Endpoint("somewhere", "stub")


def test_questions_are_read_out_of_an_answer():
    answer = 'Sure:\n1. What is it?\n- "Who made this?"\n3) What is it?\n\n* what colour has it\nYes'
    assert lines_of(answer) == ["What is it?", "Who made this?", "what colour has it"]


def test_a_local_text_model(tmp_path, source):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = LocalTextModel(tmp_path / "model")
    first, again, other = (model.complete("who made this ?", 8, seed) for seed in (0, 0, 1))
    assert first == again != other
    TextGenerator(model).make("rephrases", read_source(source)[0][0], 2, 0)
    with pytest.raises(ValueError, match="config.json"):
        LocalTextModel(tmp_path)


# ---------------------------------------------------------------------- pictures


def test_own_pictures(source, tmp_path):
    rows, _ = read_source(source)
    for name in ("more/0/same/b.png", "more/0/same/a.png", "more/0/alike/c.jpg", "more/unrelated/d.png"):
        picture(tmp_path / name, hash(name) % 1000)
    folder = PictureFolder(tmp_path / "more")
    made = folder.make("other_images", rows[0], 5, 0)
    assert [piece.image.rpartition("/")[2] for piece in made] == ["a.png", "b.png"]
    assert len(folder.make("look_alikes", rows[0], 5, 0)) == 1 and not folder.make(
        "look_alikes", rows[1], 5, 0
    )
    assert folder.make("unrelated_images", rows[1], 5, 0)[0].prompt
    outside = SimpleNamespace(id="../..", place="line 9")
    with pytest.raises(GeneratorFailed, match="line 9: the id"):
        folder.make("other_images", outside, 1, 0)
    with pytest.raises(ValueError, match="is no folder"):
        PictureFolder(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def answerer():
    return Answerer(*load_embedded())


def test_neighbours_by_the_vision_tower(answerer, tmp_path):
    samples = edit_samples(World(0), "train", 12)
    for number, sample in enumerate(samples):
        sample.locality["hard_image"][0].image.save(tmp_path / f"alike-{number}.png")
        sample.locality["m_loc"][0].image.save(tmp_path / f"other-{number}.png")
        sample.request.image.save(tmp_path / f"copy-{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows, _ = read_source(write_source(samples, tmp_path / "rows"))
    found = Neighbours(answerer, tmp_path, [row.image for row in rows])
    assert len(found.broken) == 1 and "broken.png" in found.broken[0] and len(found.files) == 36
    right = 0
    for number, row in enumerate(rows):
        made = [piece.image.rpartition("/")[2] for piece in found.make("look_alikes", row, 5, 0)]
        assert f"copy-{number}.png" not in made  # the very same picture is no look-alike
        right += f"alike-{number}.png" in made
        far = found.make("unrelated_images", row, 2, 0)
        assert far == found.make("unrelated_images", row, 2, 0) and far[0].prompt
    assert right >= 9  # of 12; at random 5 of 36 would be found
    with pytest.raises(ValueError, match="no pictures"):
        Neighbours(answerer, tmp_path / "nowhere")


def test_faiss_and_pytorch_find_the_same(generator):
    pytest.importorskip("faiss")
    vectors = torch.nn.functional.normalize(torch.randn(50, 8, generator=generator), dim=1)
    index = Index(vectors)
    first = index.search(vectors[3:4], 10)
    index._faiss = None
    assert first[0] == index.search(vectors[3:4], 10)[0] and first[0][0] == 3


def test_neighbours_without_faiss(generator):
    vectors = torch.nn.functional.normalize(torch.randn(50, 8, generator=generator), dim=1)
    index = Index(vectors)
    index._faiss = None
    order, cosine = index.search(vectors[3:4], 60)
    assert order[0] == 3 and len(order) == 50 and cosine == sorted(cosine, reverse=True)


def test_drawn_pictures(source, tmp_path):
    rows, _ = read_source(source)
    asked = []

    def pipeline(prompt, generator):
        asked.append(prompt)
        seed = int(torch.randint(10**6, (1,), generator=generator))
        return SimpleNamespace(images=[picture(tmp_path / "drawn.png", seed)])

    found = DiffusersPictures(pipeline, tmp_path / "drawn")
    assert found.cost("other_images", rows[0], 3).pictures == 3
    made = found.make("other_images", rows[0], 2, 0)
    assert asked == ["a photo of a cup"] * 2 and made[0].image != made[1].image
    assert found.make("other_images", rows[0], 2, 0) == made and len(asked) == 2  # they are there already
    with pytest.raises(GeneratorFailed, match="neither thing nor answer"):
        found.make("other_images", SimpleNamespace(id="1", thing="", answer=None, place="line 4"), 1, 0)


# ---------------------------------------------------------------------- filters and bad input


def test_what_is_dropped(tmp_path):
    image = picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2)
    image.resize((37, 37)).save(tmp_path / "copy.jpg", quality=80)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    hashes, prompts = Hashes([str(tmp_path / "a.png")]), {plain("What is it?")}

    def why(kind, **piece):
        return why_dropped(kind, Piece(**piece), prompts, hashes)

    assert why("rephrases", prompt="what is  it ") == "the same question is there already"
    assert why("rephrases", prompt="What could it be?") is None
    assert why("texts", prompt="what could it be") == "the same question is there already"
    assert why("texts", prompt=" ? ") == "an empty question"
    assert why("other_images", image=str(tmp_path / "copy.jpg")) == "the same picture is there already"
    assert why("look_alikes", image=str(tmp_path / "b.png")) is None
    assert "cannot be read" in why("look_alikes", image=str(tmp_path / "broken.png"))
    assert says("It is a Lamp.", "a lamp") and not says("a lampshade", "a lamp")


class Fixed:
    """A generator of given pieces."""

    name, settings = "fixed", ""

    def __init__(self, **pieces):
        self.pieces, self.makes = pieces, frozenset(pieces)

    def cost(self, kind, row, count):
        raise AssertionError

    def make(self, kind, row, count, attempt):
        return [] if attempt else self.pieces[kind]


def test_the_unedited_model_decides_what_can_be_used(source):
    rows = read_source(source)[0][:1]
    answers = {
        "What is thing 0?": "a cup",
        "Which thing is it?": "it is a cup",
        "Where is it?": "",
        "Who?": "me",
    }
    model = SimpleNamespace(settings="", answers=lambda asked: [answers[prompt] for _, prompt in asked])
    made = Fixed(
        rephrases=[Piece("Which thing is it?"), Piece("Who?"), Piece("what is thing 0")],
        near_questions=[Piece("Where is it?"), Piece("Who?", answer="you"), Piece("Who?")],
    )
    wanted = Wanted(1, 0, 2, 0, 0, 0, 0)
    built = build(rows, [made], wanted, model, Cache())
    (sample,) = built.samples
    assert sample.base_answer == "a cup" and [p.prompt for p in sample.generality["t_gen"]] == [
        "Which thing is it?"
    ]
    assert built.short == ["line 1 (0), near_questions: 0 of 2"]
    reasons = [(drop.what, drop.reason) for drop in built.drops]
    assert ("Who?", "the unedited model answers 'me', not 'a cup'") in reasons
    assert ("what is thing 0", "the same question is there already") in reasons
    assert ("Where is it?", "the unedited model answers nothing") in reasons
    free = build(rows, [made], Wanted(3, 0, 2, 0, 0, 0, 0, answered=False), model, Cache())
    assert len(free.samples[0].generality["t_gen"]) == 2


def test_bad_rows_are_named_by_line_or_left_out(source):
    lines = source.read_text().splitlines()
    good = json.loads(lines[0])
    (source.parent / "broken.png").write_bytes(b"no picture")
    bad = [
        (json.dumps({k: v for k, v in good.items() if k != "image"}), "field 'image' is missing"),
        (json.dumps(good | {"image": "gone.png"}), "field 'image' image 'gone.png' is not there"),
        (json.dumps(good | {"image": "broken.png"}), "field 'image' cannot be used"),
        (json.dumps(good | {"new_answer": " A cup"}), "field 'new_answer' is the answer"),
        (
            json.dumps(good | {"id": "7"}) + "\n" + json.dumps(good | {"id": "7"}),
            "field 'id' is '7', as in line 2",
        ),
        ('{"image": ', "is not JSON"),
    ]
    for line, said in bad:
        source.write_text(f"{lines[0]}\n{line}\n{lines[2]}\n")
        with pytest.raises(ValueError, match=rf"rows.jsonl, line [23].*{said}"):
            read_source(source)
        rows, left = read_source(source, skip_bad=True)
        assert len(left) == 1 and len(rows) >= 2
    source.write_text(bad[0][0] + "\n")
    with pytest.raises(ValueError, match="none of 1 rows can be used"):
        read_source(source, skip_bad=True)


def test_a_world_as_a_generator(answerer, tmp_path):
    samples = edit_samples(World(0), "train", 2)
    rows, _ = read_source(write_source(samples, tmp_path))
    cache = tmp_path / "cache.jsonl"
    built = build(rows, [FromSamples(samples, tmp_path)], Wanted(), answerer, Cache(cache))
    assert len(built.samples) == 2
    for sample, row in zip(built.samples, samples, strict=True):
        assert sample.request.target == row.request.target and sample.base_answer
        assert not {p.prompt for p in sample.generality["t_gen"]} & {*sample.rephrases, sample.request.prompt}
        assert all(p.answer for probes in sample.locality.values() for p in probes)
    silent = SimpleNamespace(
        settings=answerer.settings, answers=lambda asked: pytest.fail("all of it is cached")
    )
    again = build(rows, [FromSamples(samples, tmp_path)], Wanted(), silent, Cache(cache))
    assert again.samples == built.samples


def test_a_damaged_cache_is_refused(tmp_path):
    file = tmp_path / "cache.jsonl"
    file.write_text('{"key": "a", "found": 1}\nnothing\n')
    with pytest.raises(ValueError, match="line 2 is no line of a cache"):
        Cache(file)
