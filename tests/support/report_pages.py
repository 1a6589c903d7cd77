"""Made-up results, and pages read as a browser would."""

import json
import re
from html.parser import HTMLParser

from dualedit.analysis import read_results, render_report

HEAD = {"dualedit_eval": 1, "arguments": {"--methods": ["dualedit"], "--seed": 0}}
NASTY = "<script>alert('1')</script> & \"why | when\" <!--"
VOID = {"meta", "img", "br", "link", "input"}


def probe(metric, right=True, **more):
    """A record; a gate of radius 1 that did what it should, unless told otherwise."""
    change = metric in ("rel", "t_gen", "v_gen", "portability")
    before, expected = "old", "new" if change else "old"
    answer = expected if right else "odd"
    gate = {"fired": change, "distance": 0.25 if change else 2.0, "radius": 1.0}
    found = {
        "metric": metric, "prompt": f"{metric} ?", "image": None, "expected": expected, "before": before,
        "answer": answer, "correct": right, "contains": right, "edit": "new", "edit_prompt": "rel ?", **gate,
        "teacher_forced": None, "published": None,
    }  # fmt: skip
    return found | more


def unit(sample, probes, method="dualedit", **more):
    return {
        "method": method, "protocol": "single", "edits": 2, "phase": "after", "sample": sample,
        "id": f"fact {sample}", "family": "brand", "target": "new",
        "costs": {"edit_seconds": 0.5, "edit_bytes": 2048}, "probes": probes,
    } | more  # fmt: skip


def gateless(*probes):
    nothing = {"fired": None, "edit": None, "edit_prompt": None, "distance": None, "radius": None}
    return [one | nothing for one in probes]


def written(file, *units, head=HEAD, tail=""):
    lines = [json.dumps(line) for line in (head, *units)]
    file.write_text("\n".join(lines) + "\n" + tail)
    return file


def page_of(file, **more):
    text = render_report(read_results(file), **more)
    check_page(text)
    return text


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def parsed(text):
    tags = _Tags()
    tags.feed(text)
    tags.close()
    assert tags.open == []
    return tags


def words_of(text):
    return " ".join(" ".join(parsed(text).words).split())


def check_page(text):
    """One file: every tag closed, no scripts, and nothing fetched from outside."""
    tags = parsed(text)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in tags.seen}
    assert not any(name in attributes for _, attributes in tags.seen for name in ("src", "href", "onload"))
    assert set(re.findall(r"url\((.{12})", text)) <= {'"data:image/'} and "@import" not in text
    metas = [attributes for tag, attributes in tags.seen if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert "prefers-color-scheme: dark" in text
