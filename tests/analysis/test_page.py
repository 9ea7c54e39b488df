"""The web page, read by a parser of its own; how it looks and moves is tested in a browser."""

import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from memlm.analysis.flow import memory_flow
from memlm.analysis.memory_page import generate_memory_report, passage, slot_table, token_view
from memlm.analysis.page import Chapter, Figures, Listings, Source, Table, Token, Tokens, fewer_colors, png, render
from memlm.config import ConfigError
from tests.experiments.tiny import T, tiny

EVIL = "<script>alert('1')</script>\"><img src=x onerror=alert(2)>&amp;"
VOID = {"meta", "img", "input", "br", "hr", "link"}


class Page(HTMLParser):
    """Elements with their attributes and text; refuses what is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.found, self.text = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    def all(self, tag, **wanted):
        return [a for t, a in self.found if t == tag and all(a.get(k) == v for k, v in wanted.items())]


def figure():
    drawn = Figure(figsize=(4, 3))
    drawn.subplots().plot([1, 2, 4])
    return png(drawn)


def page():
    token = Token(EVIL, 0, 0.5, float("nan"), [EVIL], [Source(EVIL, 0.25, EVIL, EVIL, 0)], EVIL)
    parts = [
        Table(EVIL, [EVIL], [[EVIL], [0.5]], [EVIL], frozenset([1]), searchable=True),
        Figures(EVIL, [(EVIL, figure())], [EVIL]),
        Listings(EVIL, [(EVIL, EVIL)]),
        Tokens(EVIL, [token], [EVIL]),
    ]
    return render(EVIL, [Chapter(EVIL, [EVIL], parts)])


def test_all_text_is_escaped():
    parsed = Page(page())
    assert len(parsed.all("script")) == 1
    assert len(parsed.all("img")) == 1
    # title twice, contents, chapter and lead; 4 headings; table: head, cell, note; figure: caption, note; listing: 2;
    # token: text, told, source's layer, text and where; what begins, note
    assert "".join(parsed.text).count(EVIL) == 5 + 4 + 3 + 2 + 2 + 7
    assert parsed.all("img")[0]["alt"] == EVIL


def test_the_page_fetches_nothing():
    html = page()
    parsed = Page(html)
    links = [a[key] for _, a in parsed.found for key in ("src", "href", "data", "action") if key in a]
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not parsed.all("link")
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", html)
    assert parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"].startswith(
        "default-src 'none'"
    )


def test_a_figure_with_fewer_colors_looks_the_same():
    image = figure()
    small = fewer_colors(image)
    assert len(small) < 0.6 * len(image)
    a, b = (np.asarray(Image.open(io.BytesIO(i)).convert("RGB"), dtype=float) for i in (image, small))
    assert a.shape == b.shape
    assert np.abs(a - b).mean() < 2


V = 40
TOKENIZER = SimpleNamespace(
    pad_id=0,
    vocab_size=V,
    decode=lambda ids: "".join(f" w{i}" for i in ids),
    decode_each=lambda ids: [f" w{i}" for i in ids],
    encode=lambda text: [int(word) for word in text.split()],
)


class Maker:
    def draw(self, rng, n, split):
        assert split == "evaluation"
        return [SimpleNamespace(tokens=(31, 32, 33, 34, 35), text="31 32 33 34 35")] * n


DATA = SimpleNamespace(
    tokenizer=TOKENIZER,
    maker=Maker(),
    tokens=lambda split: SimpleNamespace(
        tokens=torch.randint(1, 30, (20 * T,), generator=torch.Generator().manual_seed(0)).int().numpy()
    ),
)


def test_the_passage_tells_a_fact_once_and_asks_for_it_in_a_new_context():
    model = tiny(TOKENIZER, "ltm")
    contexts, about = passage(model, DATA)
    assert len(contexts) == 2
    assert contexts[1] == [31, 32, 33, 34, 35]
    places = [i for i in range(len(contexts[0])) if contexts[0][i : i + 5] == contexts[1]]
    assert len(places) == 1
    assert places[0] + 5 <= T  # a later segment can read it
    assert "'31 32 33 34 35'" in about

    class NoWords:
        def draw(self, *_):
            raise ConfigError("too few words")

    plain = SimpleNamespace(tokenizer=TOKENIZER, maker=NoWords(), tokens=DATA.tokens)
    assert len(passage(model, plain)[0]) == 1


@pytest.mark.parametrize("memories", [("ltm", "stm"), ()])
def test_report_of_a_model_shows_costs_slots_and_reads(tmp_path, memories, monkeypatch):
    model = tiny(TOKENIZER, *memories)
    monkeypatch.setenv("HOME", str(tmp_path))
    html = generate_memory_report(model, DATA, path="~/report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html
    parsed = Page(html)
    text = " ".join("".join(parsed.text).split())
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text
    if not memories:
        assert "This model has no memory." in text
        assert not parsed.all("span", role="tooltip")
        return
    contexts, _ = passage(model, DATA)
    tokens = [a for a in parsed.all("span", tabindex="0") if a["class"].startswith("token")]
    assert len(tokens) == sum(map(len, contexts))
    # without script or pointer too: what the last token read is in the page, and where it comes from
    state = model.eval().init_state(1)
    with torch.no_grad():
        state = model.new_context(model(torch.tensor([contexts[0]]), state=state).state)
        read = model(torch.tensor([contexts[1]]), state=state).reads["ltm/1"]
    slot = int(read.slots[0, -1, read.weights[0, -1].argmax()])
    place = int(state.memory["ltm"][0].position[0, slot])
    weight = float(read.weights[0, -1].max() * read.gate[0, -1])
    last = text[text.rindex("Token ") :]
    assert f"{100 * weight:.1f} % " in last
    assert f"slot {slot}, token {place}, written by segment {place // T} (ltm/1)" in last
    assert str(place) in tokens[-1]["data-from"].split()
    # every filled slot is in the table, those first that were read most
    (table,) = parsed.all("table", **{"class": "sortable"})
    rows = html[html.index(table["id"]) :].split("<tr>")[2:]
    with torch.no_grad():
        after = model.new_context(model(torch.tensor([contexts[1]]), state=state).state)
    filled = int((after.memory["ltm"][0].record >= 0).sum()) + 5
    assert len(rows) == filled
    amounts = [float(re.findall(r'class="number">([^<]+)<', row)[1]) for row in rows]
    assert amounts == sorted(amounts, reverse=True)
    assert amounts[0] > 0


def test_a_token_tells_which_segment_wrote_and_evicted_it():
    model = tiny(TOKENIZER, "ltm", n_slot=10)
    flow = memory_flow(model, ["1 2 3 4 5 6 7 8 " * T])
    writes = flow.writes["ltm/1"]
    tokens = token_view(flow, "").tokens
    assert sum(map(len, writes.evicted)) > 10
    for what, parts in (("Written to", writes.written), ("Evicted from", writes.evicted)):
        for s, part in enumerate(parts):
            told = {token.place for token in tokens if f"{what} ltm/1 by segment {s}." in token.told}
            assert told == {origin.place for origin in part}


def test_long_texts_and_large_banks_are_cut_with_a_note(monkeypatch):
    monkeypatch.setattr("memlm.analysis.memory_page.MOST_TOKENS", 10)
    model = tiny(TOKENIZER, "ltm")
    html = generate_memory_report(model, DATA, ["1 2 3 4 " * T])
    assert html.count('role="tooltip"') == 10
    assert f"Only the last 10 of {4 * T} tokens are shown." in html
    flow = memory_flow(model, ["1 2 3 4 " * T])
    table = slot_table(model, flow, 5)
    assert len(table.rows) == 5
    assert f"5 of {int((flow.state.memory['ltm'][0].record >= 0).sum())} slots are shown" in table.notes[1]
    html = generate_memory_report(model, DATA, ["1 2 3"])
    assert "Nothing was read: memory holds what earlier segments and contexts wrote" in html


@pytest.mark.parametrize("data", [["text"], "text", 5])
def test_what_is_no_data_is_refused(data):
    with pytest.raises(ConfigError, match=r"data is what the model was trained on, .*; texts .* contexts=\[text"):
        generate_memory_report(tiny(TOKENIZER, "ltm"), data)


@pytest.mark.parametrize("name", ["cache", "rmt"])
def test_of_a_memory_without_slots_the_page_tells_what_it_changes(name):
    html = generate_memory_report(tiny(TOKENIZER, name), DATA, ["1 2 3 4 " * T])
    assert "No memory of this model has slots" in html
    assert "it cannot be told what a token read" in html
    assert html.count("with memory and") == 4 * T - 1
    assert "What memory costs" in html


def test_a_page_shows_what_a_browser_would_obey():
    odd = "a\x00b\u202ec\x1b"
    html = render(odd, [Chapter(odd, [odd], [Table(odd, [odd], [[odd, 1.5]], [odd]), Listings(odd, [(odd, odd)])])])
    assert not set("\x00\u202e\x1b") & set(html)
    assert html.count(r"a\x00b\u202ec\x1b") >= 8
    assert "1.5" in html
