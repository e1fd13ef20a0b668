"""The HTML report: what it says, that strangers' words stay words, and that it needs nothing beside it."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from pytest_qvl.cli import main
from pytest_qvl.records.compare import compare
from pytest_qvl.records.page import as_page
from pytest_qvl.records.page_data import page_data
from pytest_qvl.records.stored import read_record

RECORDS = Path(__file__).parents[2] / "docs" / "records"
EMBEDDED, SEVEN = RECORDS / "h200-embedded.json", RECORDS / "h200-qwen2.5-vl-7b.json"
CSS = Path(__file__).parents[2] / "pytest_qvl" / "records" / "templates" / "page.css"
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}\x1b[31m\u202e"
VOID = {"meta", "br", "img"}
LOADS = {"script", "iframe", "object", "embed", "link", "base", "form", "svg", "audio", "video"}


class Parsed(HTMLParser):
    """Tags with their attributes, the text, and whether every tag was closed in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def record():
    return read_record(EMBEDDED)


def entry(record, check):
    return next(one for one in record["checks"] if one["check"] == check)


def broken(record):
    changed = deepcopy(record)
    entry(changed, "feature_scatter").update(problems=["12 placeholders hold text"], outcome="failed")
    next(one for one in changed["promises"] if one["number"] == 5)["state"] = "BROKEN"
    changed["errors"].append(
        {"target": None, "test": "test_own", "when": "call", "check": None, "text": "assert 1 == 2"}
    )
    changed["problems"].append("no GPU test was executed")
    return {**changed, "exit_status": 1, "tests": {"passed": 40, "failed": 2}}


def test_a_green_run_says_so_first(record):
    page = page_data(record)
    words = Parsed(as_page(record)).words()
    assert (page.tone, page.verdict) == ("good", "Kept, as far as judged")
    assert "✓ Kept, as far as judged" in words.split("Failures")[0]
    assert page.failures == ()
    assert "What failed" not in words
    (target,) = page.targets
    assert [row.number for row in target.rows] == list(range(1, 13))
    ten = target.rows[9]
    assert (ten.state, ten.weakest.name) == ("kept", "smallest loss within 40 steps")
    assert 0 < ten.weakest.share <= 100
    (table,) = [one.table for one in page.checks if one.check == "alignment"]
    assert " ".join(table.columns) in words


def test_a_failure_has_cause_fix_and_command(record):
    page = page_data(broken(record))
    assert (page.tone, page.verdict) == ("bad", "Broken")
    scatter, own = page.failures
    assert scatter.says == "12 placeholders hold text"
    assert scatter.cause and scatter.fix and all(link.startswith("https://github.com/") for _, link in scatter.threads)
    assert scatter.command.endswith("-k test_feature_scatter")
    assert "--qvl-record" not in scatter.command and ".json" not in scatter.command
    assert (own.check, own.cause, own.says) == ("", "", "assert 1 == 2")
    words = Parsed(as_page(broken(record))).words()
    assert words.index("What failed") < words.index("Promises embedded on cuda")
    for said in (
        "no GPU test was executed",
        "pytest-qvl explain feature_scatter",
        "1 other failure. Tests: ",
        "1 BROKEN",
    ):
        assert said in words


@pytest.mark.parametrize(
    ("status", "errors", "verdict"),
    [(2, [], "Stopped early"), (1, [], "Red"), (1, [{"target": None, "test": "t", "check": None, "text": "x"}], "Red")],
)
def test_a_run_that_is_red_for_another_reason_is_not_kept(record, status, errors, verdict):
    assert page_data({**record, "exit_status": status, "errors": errors}).verdict == verdict


def test_a_run_without_a_model_is_not_judged(record):
    empty = {**record, "checks": [], "promises": [], "session": [], "vram": {}, "exit_status": 0}
    page = page_data(empty)
    assert (page.tone, page.verdict, page.phases) == ("muted", "Not judged", ())
    assert "No test of this run used a model." in Parsed(as_page(empty)).words()


def test_memory_is_held_against_the_card():
    record = read_record(SEVEN)
    page = page_data(record)
    assert page.card is not None and page.card[0] == "NVIDIA H200" and page.card_share == 100
    load = next(phase for phase in page.phases if phase.name == "load")
    assert [name for name, _, _ in load.numbers] == ["tensors", "allocator", "card"]
    assert [share for _, _, share in load.numbers] == sorted(share for _, _, share in load.numbers)
    record["configuration"] = [{"name": "qvl_card", "value": "t4", "source": "--qvl-card"}]
    small = page_data(record)
    assert small.card is not None and "T4" in small.card[0]
    largest = record["vram"]["session"]["process"] / 2**30
    assert small.card_share == pytest.approx(100 * small.card[1] / largest, abs=0.01)


def evil(value):
    """The same record with a stranger's words in every text that nobody chooses from a list."""
    if isinstance(value, dict):
        kept = {"schema", "relation", "state", "outcome", "when", "check"}
        return {key: one if key in kept else evil(one) for key, one in value.items()}
    if isinstance(value, list):
        return [evil(one) for one in value]
    return value + EVIL if isinstance(value, str) else value


def test_what_strangers_say_stays_text(record):
    base = deepcopy(record)
    changed = evil(broken(record))
    images = ["data:image/png;base64,AAAA", "https://example.org/x.png", f"javascript:{EVIL}"]
    probe = {"target": "t", "skill": "s", "question": "q", "answer": "a", "replies": {"NF4": ""}}
    changed["probes"] = [{**evil(probe), "images": images}]
    changed["known_failures"] = [{"reason": EVIL, "state": "stale"}]
    page = as_page(changed, compare({**base, "checks": evil(base["checks"])}, changed))
    parsed = Parsed(page)
    assert not LOADS & {tag for tag, _ in parsed.tags}
    for _tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert set(attributes) <= {
            *(
                "lang",
                "charset",
                "name",
                "content",
                "http-equiv",
                "class",
                "href",
                "rel",
                "id",
                "scope",
                "style",
                "open",
            ),
            *("src", "alt", "role", "tabindex", "colspan", "title", "aria-label", "aria-labelledby", "aria-hidden"),
        }
        assert attributes.get("src", images[0]) == images[0]
        if "href" in attributes:
            assert re.fullmatch(r"#[a-z]+|https://github\.com/[\w./-]+", attributes["href"])
        if "style" in attributes:
            assert re.fullmatch(r"(width|left):[\d.]+%", attributes["style"])
    assert "<script>alert(1)</script>" in parsed.words()
    assert "\x1b" not in page and "\u202e" not in page and "\\x1b[31m" in page
    assert "{{ 7*7 }}" in parsed.words()


def test_what_the_model_said_stands_beside_what_is_right(record):
    said = {"full precision": "orange", "NF4": "It is orange.", "NF4 + LoRA": "blue"}
    probe = {"target": "embedded on cuda", "skill": "colour", "question": "What colour?", "answer": "orange"}
    words = Parsed(as_page({**record, "probes": [{**probe, "images": [], "replies": said}]})).words()
    assert "right answer orange full precision orange ✓ NF4 It is orange. ✓ NF4 + LoRA blue ✗ differs" in words
    lacking = {**probe, "images": [], "replies": {"full precision": "orange"}, "failed": {"NF4": "KeyError: <b>"}}
    words = Parsed(as_page({**record, "probes": [lacking]})).words()
    assert "full precision orange ✓ NF4 ✗ failed KeyError: <b>" in words


def test_the_page_needs_nothing_beside_it(record):
    page = as_page(broken(record))
    assert "default-src 'none'" in page
    assert "@import" not in page and "url(" not in page
    assert not LOADS & {tag for tag, _ in Parsed(page).tags}


def test_a_keyboard_and_a_screen_reader_find_their_way(record):
    tags = Parsed(as_page(broken(record), compare(record, broken(record)))).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in tags:
        assert attributes.get("href", "#main")[0:1] != "#" or attributes.get("href", "#main")[1:] in ids
        assert attributes.get("aria-labelledby", ids[0]) in ids
    headings = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")


def luminance(colour):
    full = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    parts = (int(full[i : i + 2], 16) / 255 for i in (0, 2, 4))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_in_both_schemes(scheme):
    """WCAG 2.2, success criterion 1.4.3: a contrast of 4.5."""
    block = CSS.read_text(encoding="utf-8").split(":root {")[scheme + 1].split("}")[0]
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", block))
    pairs = [(text, panel) for text in ("text", "soft", "link") for panel in ("page", "panel")]
    pairs += [(tone, f"{tone}-panel") for tone in ("good", "bad", "muted")]
    pairs += [(text, f"{tone}-panel") for text in ("text", "soft") for tone in ("good", "bad", "muted")]
    for text, panel in pairs:
        bright, dim = sorted((luminance(colours[text]), luminance(colours[panel])), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (text, panel)


def test_every_committed_record_has_a_page(tmp_path, capsys):
    for file in RECORDS.glob("h*.json"):
        data = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(data, dict) and str(data.get("schema")).startswith("pytest-qvl/record/"):
            assert Parsed(as_page(read_record(file))).words()
    out = tmp_path / "page.html"
    assert main(["report", str(SEVEN), "--html", str(out), "--base", str(RECORDS / "h100-qwen2.5-vl-7b.json")]) == 0
    assert "Compared with the base record" in Parsed(out.read_text(encoding="utf-8")).words()
    assert main(["report", str(EMBEDDED), "--html", str(out)]) == 0  # over its own kind
    assert main(["report", str(EMBEDDED), "--md", str(tmp_path / "summary.md")]) == 0
    assert (tmp_path / "summary.md").read_text(encoding="utf-8").startswith("## ✅ pytest-qvl: Kept")
    capsys.readouterr()


def test_a_summary_does_not_replace_the_record_it_is_made_of(tmp_path, capsys):
    record, text = tmp_path / "r.json", EMBEDDED.read_bytes()
    record.write_bytes(text)
    for arguments in ([str(record)], [str(EMBEDDED), "--base", str(record)]):
        assert main(["report", *arguments, "--md", str(record)]) == 2
        assert "is the record itself" in capsys.readouterr().err and record.read_bytes() == text


@pytest.mark.parametrize(
    ("name", "says"), [("mine.html", "is no report of a run"), ("no/where.html", "no folder"), (".", "folder")]
)
def test_a_report_replaces_nothing_else(tmp_path, monkeypatch, capsys, name, says):
    monkeypatch.chdir(tmp_path)
    Path("mine.html").write_text("<p>mine</p>")
    assert main(["report", str(EMBEDDED), "--html", name]) == 2
    assert says in capsys.readouterr().err
    assert Path("mine.html").read_text() == "<p>mine</p>"
