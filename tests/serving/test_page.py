"""The page in a real browser: ask, correct, ask again, a look-alike, what others see, take back."""

import os
import shutil

import pytest
from dualedit.serving import Example, Service, Settings
from dualedit.toy.editors import load_editor
from served import QUESTION, running

gradio = pytest.importorskip("gradio", reason="the extra page is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)"),
]
SHOTS = os.environ.get("DUALEDIT_SCREENSHOTS")  # a folder for pictures of what the tests saw


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser):
    """Opens the page as a person with a screen of her own."""
    contexts = []

    def open_page(address, token, width=1280, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(f"{address}/?token={token}")
        page.wait_for_selector("#question textarea")
        return page

    yield open_page
    for context in contexts:
        context.close()


def examples_of(pictures):
    return [Example(p.image, p.file, p.shows, tuple(q for q, _ in p.questions)) for p in pictures]


def text(page, selector):
    return page.inner_text(selector).replace("\n", " ")


def shot(page, name):
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def test_the_whole_story(visit, pictures, tmp_path):
    service = Service(
        load_editor(fallback=False), tmp_path / "edits", Settings(token="s3", page=True),
        examples_of(pictures),
    )  # fmt: skip
    with running(service) as address:
        ann = visit(address, "s3")
        ann.click("#examples button >> nth=0")  # a logo, and a question about it
        ann.wait_for_selector("#picture img")
        ann.wait_for_function(f"document.querySelector('#question textarea').value == '{QUESTION}'")
        ann.focus("#question textarea")
        ann.keyboard.press("Enter")
        ann.wait_for_selector("#answer .says")
        assert "spain" in text(ann, "#answer .says") and "The model itself answers" in text(ann, "#answer")
        # corrected with one field, by keyboard alone
        ann.fill("#who input, #who textarea", "Ann <b>")
        ann.focus("#target textarea")
        ann.keyboard.type("norway")
        ann.keyboard.press("Enter")
        ann.wait_for_selector("#said .note.good")
        assert "Asked again, the model answers norway" in text(ann, "#said")
        assert "norway" in text(ann, "#answer .says") and "Edit 1 by Ann <b> answers" in text(ann, "#answer")
        bar = ann.get_attribute("#answer .gate", "aria-label")
        assert bar.startswith("distance <0.001; edit 1 reaches 0.")
        assert [e.target for e in service.edits] == ["norway"]
        assert (tmp_path / "edits" / "adapter_model.safetensors").is_file()
        # another wording, the same brand again, a look-alike: before and after
        ann.fill("#wordings textarea", "name the country of this brand.")
        ann.click("#compare")
        ann.wait_for_selector("#compared .card")
        cards = [card.inner_text() for card in ann.query_selector_all("#compared .card")]
        assert len(cards) == 1 + 1 + len(pictures) - 1
        for card in cards[:3]:
            assert "before: spain" in card and "after: norway changed" in card
        assert "differs in one detail" in cards[3] and "after: greece as before" in cards[3]
        assert all("as before" in card for card in cards[3:])
        assert ann.evaluate("[...document.querySelectorAll('img')].filter(i => !i.alt).length") == 0
        shot(ann, "story")
        ann.click("text=Switch off edit 1")
        ann.wait_for_selector("text=Switch on edit 1")
        assert not service.editor.explain(pictures[0].image, QUESTION).fired
        ann.click("text=Switch on edit 1")
        ann.wait_for_selector("text=Switch off edit 1")
        # somebody else, on a phone, in the dark, without the token, sees it and cannot change it
        bob = visit(address, "wrong", width=390, scheme="dark")
        bob.wait_for_selector(".edit-row")
        assert QUESTION in text(bob, ".edit-row") and "by Ann <b>" in text(bob, ".edit-row")
        assert bob.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        dark, light = (p.evaluate("getComputedStyle(document.body).backgroundColor") for p in (bob, ann))
        assert dark != light
        bob.click("text=Remove edit 1")
        bob.wait_for_selector("#done .note.bad")
        assert "Changes need the token" in text(bob, "#done") and len(service.edits) == 1
        bob.fill("#token input", "s3")
        bob.fill("#who input, #who textarea", "Bob")
        bob.click("text=Remove edit 1")
        bob.wait_for_selector("#done >> text=Edit 1 is removed.")
        bob.click("#undo")
        bob.wait_for_selector("#done >> text=The last change")
        assert [edit.author for edit in service.edits] == ["Ann <b>"]
        for _ in range(3):  # the two switches, then the edit
            bob.click("#undo")
            bob.wait_for_timeout(700)
        bob.wait_for_selector("text=No edit is stored.")
        assert "The last change, of edit 1, is taken back" in text(bob, "#done") and service.edits == []
        shot(bob, "phone")
        # the first one sees what the other did
        ann.wait_for_selector("text=No edit is stored.")
        ann.click("text=Who changed what")
        ann.wait_for_selector("#changes td >> nth=0")
        told = text(ann, "#changes")
        assert "Bob" in told and "took back edit 1" in told and "made edit 1" in told
        ann.click("#ask")
        ann.wait_for_selector("#answer >> text=The model itself")
        assert "spain" in text(ann, "#answer .says")
        # an answer that cannot be written is said, and not stored
        ann.fill("#target textarea", "zq zq zq zq zq zq zq zq")
        ann.click("#correct")
        ann.wait_for_selector("#said .note.bad")
        assert "The edit is not stored" in text(ann, "#said") and service.edits == []
        assert ann.problems == [] and bob.problems == []


def test_a_page_that_only_asks(visit, pictures):
    settings = Settings(page=True, read_only=True)
    with running(Service(load_editor(fallback=False), None, settings, examples_of(pictures[:1]))) as address:
        page = visit(address, "")
        for hidden in ("#target", "#undo", "#export"):
            assert page.locator(hidden).is_hidden()
        page.fill("#question textarea", "4 plus 5 is what?")
        page.click("#ask")
        page.wait_for_selector("#answer .says")
        assert text(page, "#answer .says") == "9" and "No edit is stored" in text(page, "#answer")
