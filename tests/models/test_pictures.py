"""Pictures in every form in which they are given, and chats of several pictures and turns."""

import base64
import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from dualedit import Editor, EditRequest
from dualedit.models.chats import read_chat
from dualedit.models.downloads import download
from dualedit.models.images import open_image
from dualedit.models.prompting import Prompter, open_questions
from tiny_models import IMAGE, LLAVA, editor_of, random_image, tiny_processor

BRAND = "what brand is this computer ?"


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image):
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


@pytest.fixture
def site(generator):
    """A site on this machine with a picture, a redirection, and an endless answer."""
    body = png(random_image(generator))

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/picture.png")
                self.end_headers()
            elif self.path == "/file":
                self.send_response(302)
                self.send_header("Location", "ftp://host/etc/passwd")
                self.end_headers()
            elif self.path == "/picture.png":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)
            elif self.path == "/endless":
                self.send_response(200)
                self.end_headers()
                try:
                    while True:
                        self.wfile.write(bytes(1000))
                except OSError:
                    pass
            else:
                self.send_error(404)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", body
    server.shutdown()
    server.server_close()


def test_one_picture_in_every_form(generator, site, tmp_path):
    image = random_image(generator)
    image.save(tmp_path / "a.png")
    forms = [image, tmp_path / "a.png", str(tmp_path / "a.png"), png(image), data_url(image), np.array(image)]
    assert {open_image(form).tobytes() for form in forms} == {image.tobytes()}
    address, body = site
    wanted = open_image(body).tobytes()
    assert open_image(f"{address}/picture.png").tobytes() == wanted
    assert open_image(f"{address}/moved").tobytes() == wanted
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    assert open_image(grey).size == (8, 6) and open_image(grey).mode == "RGB"


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("data:image/png;base64,???", "broken base64"),
        ("data:image/png;base64,", "without data"),
        ("data:image/png", "is no data URL"),
        ("data:text/plain,hello", "cannot be read as an image"),
        (np.zeros((4, 4, 3)), r"an array \[4, 4, 3\] of float64: pass \[height, width, 3\]"),
        (np.zeros((4, 4, 2), np.uint8), r"an array \[4, 4, 2\]"),
        ("ftp://host/a.png", "is an address"),
    ],
)
def test_what_is_no_picture(image, words):
    with pytest.raises(ValueError, match=words):
        open_image(image)


def test_downloads_are_bounded(site):
    address, body = site
    with pytest.raises(ValueError, match="more than 100000 bytes"):
        download(f"{address}/endless", max_bytes=100_000)
    with pytest.raises(ValueError, match="not done after 0.05 s"):
        download(f"{address}/endless", max_bytes=2**40, seconds=0.05)
    with pytest.raises(ValueError, match="cannot be downloaded: Not Found"):
        download(f"{address}/none")
    for url in (f"{address}/file", "file:///etc/passwd"):
        with pytest.raises(ValueError, match="only http and https"):
            download(url)
    for url in (f"{address}/picture.png", "http://localhost/", "http://[::1]/", "http://10.0.0.1/a.png"):
        with pytest.raises(ValueError, match="on this machine or a private network"):
            download(url, public_only=True)
    with pytest.raises(ValueError, match="nothing is downloaded here"):
        EditRequest(f"{address}/picture.png", BRAND, "lenovo")  # stored data is not fetched at every look


def test_a_question_as_a_chat_is_the_same_question(generator):
    prompter, image = Prompter(tiny_processor()), random_image(generator)
    plain = prompter.inputs([(image, BRAND)])
    for parts in (
        [{"type": "image", "image": image}, {"type": "text", "text": BRAND}],
        [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": BRAND}],
    ):
        chat = prompter.inputs(open_questions([(None, [{"role": "user", "content": parts}])]))
        assert {name: value.tolist() for name, value in chat.items()} == {
            name: value.tolist() for name, value in plain.items()
        }


def test_several_pictures_and_turns(generator):
    prompter = Prompter(tiny_processor())
    first, second = random_image(generator), random_image(generator)
    turns = [
        {"role": "system", "content": "what is this ?"},
        {"role": "user", "content": [{"type": "image", "image": first}, {"type": "text", "text": BRAND}]},
        {"role": "assistant", "content": "lenovo"},
        {"role": "user", "content": [{"type": "image", "image": second}, {"type": "text", "text": BRAND}]},
    ]
    both = [([first, second], BRAND), (None, turns), (None, BRAND), (first, BRAND)]
    batch = prompter.inputs(open_questions(both))
    assert [row.tolist().count(IMAGE) for row in batch["input_ids"]] == [8, 8, 0, 4]
    assert batch["pixel_values"].shape[0] == 5
    words = prompter.tokenizer.decode(batch["input_ids"][1])
    assert words.count(BRAND) == 2 and words.count("user :") == 3 and words.endswith("assistant :")


@pytest.mark.parametrize("method", ["dualedit", "balancedit"])
def test_an_editor_is_asked_in_chats(method, generator):
    editor = Editor(editor_of(LLAVA, method), tiny_processor(), keep_failed=True)
    image, other = random_image(generator), random_image(generator)
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": BRAND}]}]
    editor.edit(None, chat, "lenovo", negatives=[other])
    assert editor.edits[0].prompt == BRAND
    assert editor.explain(None, chat).fired and editor.explain([image], BRAND).distance == pytest.approx(
        editor.explain(image, BRAND).distance
    )
    assert editor.answer(None, chat) == editor.answer(image, BRAND)
    assert isinstance(editor.answer([image, other], BRAND), str)
    for images, prompt in ((None, [*chat, *chat]), ([image, other], BRAND)):
        with pytest.raises(ValueError, match="an edit is about one question and one picture"):
            editor.edit(images, prompt, "lenovo")
    assert len(editor.edits) == 1


def test_turns_need_a_chat_template(generator):
    prompter, image = Prompter(tiny_processor(chat=False)), random_image(generator)
    assert prompter.text(*open_questions([([image, image], BRAND)])[0]) == f"<image><image>\n{BRAND}"
    assert prompter.text(*open_questions([([image], BRAND)])[0]) == prompter.text(image, BRAND)
    turns = [{"role": "system", "content": "what is this ?"}, {"role": "user", "content": BRAND}]
    with pytest.raises(ValueError, match="2 turns and 0 pictures.*without a chat template"):
        prompter.text(*open_questions([(None, turns)])[0])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages is empty"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\]: role='tool'"),
        ([{"role": "user", "content": []}], r"messages\[0\]: content=\[\]"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], r"content\[0\] is of type 'input_audio'"),
        ([{"role": "user", "content": [{"type": "image", "image": "no.png"}]}], "content.*no such file"),
        ([{"role": "user", "content": "?"}, {"role": "assistant", "content": "me"}], "end with a question"),
    ],
)  # fmt: skip
def test_chats_that_are_none(messages, words):
    with pytest.raises(ValueError, match=words):
        read_chat(messages)
