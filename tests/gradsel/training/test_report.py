"""report.html: opened in a real browser, at two widths, in light and dark; and what it says."""

from __future__ import annotations

import json

import pytest
import torch

import gradsel
from gradsel.training import Config, costs, pictures
from gradsel.training.data import Data, Split
from gradsel.training.evaluation import metrics
from gradsel.training.report import write_report
from tests.support import browser, masks, runs

#: Everything a reader could trip over, found by the page itself.
PROBE = """() => {
  const pictures = [...document.querySelectorAll("img, svg")].map(each => {
    const box = each.getBoundingClientRect();
    const words = each.getAttribute("alt") ?? each.getAttribute("aria-label") ?? "";
    return {width: box.width, height: box.height, words, broken: each.tagName === "IMG" && !each.naturalWidth};
  });
  const letters = [...document.querySelectorAll("svg text")].map(each => {
    const matrix = each.getScreenCTM();
    return Math.hypot(matrix.a, matrix.b) * parseFloat(getComputedStyle(each).fontSize);
  });
  const colour = name => {
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = `var(${name})`;
    const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number);
    probe.remove();
    return parts;
  };
  const light = parts => parts.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (a, b) => {
    const [high, low] = [light(colour(a)), light(colour(b))].sort((x, y) => y - x);
    return (high + 0.05) / (low + 0.05);
  };
  const texts = ["--ink", "--muted", "--accent", "--good", "--bad"];
  const ids = [...document.querySelectorAll("[id]")].map(each => each.id);
  return {
    pictures,
    smallest: Math.min(...letters),
    overflow: document.documentElement.scrollWidth - innerWidth,
    contrast: Math.min(...texts.flatMap(text => [contrast(text, "--paper"), contrast(text, "--panel")])),
    series: Math.min(...[1, 2, 3, 4, 5, 6, 7, 8].map(number => contrast(`--series-${number}`, "--paper"))),
    background: getComputedStyle(document.body).backgroundColor,
    twice: ids.filter((each, place) => ids.indexOf(each) !== place),
    targets: [...document.querySelectorAll("nav a")].map(each => document.querySelector(each.getAttribute("href"))),
  };
}"""


def many_classes(folder):
    """A report with 60 classes, for which nothing is trained, and texts with everything that HTML could take amiss."""
    classes = [f"<b>$x_{number}$ & 'no {number}'</b>" for number in range(60)]
    labels = torch.arange(180) % 60
    logits = 3.0 * torch.nn.functional.one_hot((labels + (torch.arange(180) < 30)) % 60, 60).float()
    texts = [("<script>alert(1)</script> " * 30, "a-very-long-word" * 20)] * 180
    data = Data("texts", classes, {"test": Split(texts, labels.tolist())})
    results = {
        "metrics": metrics(logits, labels, classes),
        "kind": "texts",
        "method": {"name": "full"},
        "trained": 10**9,
        "parameters": 10**9,
        "share": 100.0,
        "classes": 60,
        "samples": {"train": 600, "test": 180},
        "steps": 10,
        "best_checkpoint": None,
        "bytes": 4 * 10**9,
        "bytes_of_full_model": 4 * 10**9,
        "seconds": {"selection": 0.0, "training": 7300.0, "testing": 3.0},
        "peak_memory_bytes": 17 * 10**9,
        "device": "cuda",
        "versions": {"torch": "0"},
        "history": [{"epoch": 1.0, "loss": 1.0, "learning_rate": 1e-3}],
    }
    folder.mkdir()
    config = Config.from_dict({"data": {"path": "a <b> folder"}, "model": {"name": "org/a & b"}})
    write_report(folder, config, results, data, logits, labels, None)
    return folder / "report.html"


@pytest.fixture(scope="module")
def pages(tmp_path_factory, images, table, bert):
    folder = tmp_path_factory.mktemp("reports")
    image_run = runs.image_run(images, folder / "images", output__report=True)
    options = {"rows": 2}
    text_run = runs.text_run(
        table, bert, folder / "texts", output__report=True, method__name="grft", method__options=options
    )
    data, sam = masks.masked_folder(folder / "ellipses", train=4, val=2, test=2), masks.sam_folder(folder / "sam")
    mask_run = masks.mask_run(data, sam, folder / "masks", output__report=True)
    for config in (image_run, text_run, mask_run):
        gradsel.finetune(config, quiet=True)
    return {
        "images": folder / "images" / "report.html",
        "texts": folder / "texts" / "report.html",
        "masks": folder / "masks" / "report.html",
        "many classes": many_classes(folder / "many"),
    }


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["images", "texts", "masks", "many classes"])
def test_a_browser_shows_it_without_network_and_without_complaint(name, width, scheme, pages, chromium):
    context = chromium.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, reduced_motion="reduce"
    )
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    found = page.evaluate(PROBE)
    for details in page.query_selector_all("summary"):
        details.click()
    opened = page.evaluate(PROBE)
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    assert len(found["pictures"]) >= (14 if name == "images" else 3)
    for picture in found["pictures"]:
        assert picture["width"] >= 60, picture
        assert picture["height"] >= 60, picture
        assert len(picture["words"]) > 20
        assert not picture["broken"]
    assert found["smallest"] >= 9.5
    assert found["overflow"] <= 0
    assert opened["overflow"] <= 0
    assert found["contrast"] >= 4.5
    assert found["series"] >= 3
    assert found["background"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 18, 22)"}[scheme]
    assert found["twice"] == []
    assert None not in found["targets"]


def test_it_needs_nothing_else_and_has_no_code(pages):
    for name, path in pages.items():
        text = path.read_text()
        assert "http:" not in text, name
        assert "https:" not in text, name
        assert "<script" not in text, name
        assert "var(--ink)" in text


def test_names_are_text_not_markup(pages):
    text = pages["many classes"].read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;$x_0$ &amp; &#39;no 0&#39;&lt;/b&gt;" in text
    assert "a &amp; b on a &lt;b&gt; folder" in text


def test_it_says_what_the_results_say(pages):
    text = pages["images"].read_text()
    results = json.loads((pages["images"].parent / "results.json").read_text())
    assert f"<dd>{results['metrics']['top1']:.1f} %</dd>" in text
    assert f"{results['trained']:,} of {results['parameters']:,} parameters trained" in text
    assert text.count('<img src="data:image/png;base64,') >= 8
    assert "validation set, that of step" in text
    assert "<blockquote>the " in pages["texts"].read_text()
    assert "belong to the neurons" in pages["texts"].read_text()


def test_examples_are_one_of_each_class_first_and_the_most_certain():
    from gradsel.training.report import _examples

    data = Data("texts", ["a", "b"], {"test": Split([(f"text {n}",) for n in range(12)], [0] * 12)})
    logits = torch.zeros(12, 2)
    logits[:10, 0] = torch.arange(1.0, 11.0)
    logits[10:, 1] = torch.tensor([5.0, 1.0])
    right = _examples(data, logits, torch.tensor([0] * 11 + [1]), right=True)
    assert [each.texts for each in right[:3]] == [["text 9"], ["text 11"], ["text 8"]]
    wrong = _examples(data, logits, torch.tensor([0] * 11 + [1]), right=False)
    assert [(each.said, each.truth) for each in wrong] == [("b", "a")]


def test_strips_show_where_the_selected_entries_lie():
    from gradsel.masks import PerRow, WholeRows

    inputs = torch.tensor([[0, 5], [0, 100]], dtype=torch.int32)
    strip = pictures._strip(PerRow(inputs, (2, 128)), by_rows=False)
    assert strip[0] == 1
    assert strip[2] == strip[50] == 0.5
    assert strip.sum() == 2
    strip = pictures._strip(WholeRows(torch.tensor([1], dtype=torch.int32), (4, 3)), by_rows=True)
    assert strip.tolist() == [0] * 16 + [1] * 16 + [0] * 32


def test_a_model_without_blocks_has_pictures():
    from gradsel.masks import PerRow

    mask = PerRow(torch.tensor([[1], [3]], dtype=torch.int32), (2, 4))
    selection = gradsel.Selection({"embedding.weight": mask}, {})
    assert pictures._block_labels([""]) == ["outside"]  # whose shortening never ended
    for picture in (pictures.distribution(selection), pictures.places(selection)[0]):
        assert "outside" in picture


def test_costs_are_those_of_what_is_trained():
    from gradsel.masks import PerRow, Whole
    from gradsel.selection.selection import Selection

    selection = Selection({"a": PerRow(torch.zeros(10, 1, dtype=torch.int32), (10, 50)), "b": Whole((10,))})
    results = {
        "trained": 20, "parameters": 510, "bytes": 100, "bytes_of_full_model": 2040, "steps": 4, "device": "cpu",
        "seconds": {"selection": 0.5, "training": 8.0, "testing": 0.1}, "peak_memory_bytes": None,
    }  # fmt: skip
    rows = {row.what: row for row in costs.table(results, selection)}
    held = rows["gradients, Adam's moments, indices"]
    assert (held.ours, held.full) == ("280 bytes", "6.12 kB")  # 20 * 12 + 10 * 4, 510 * 12
    assert held.share == pytest.approx(280 / 6120)
    assert "2000 ms a step" in rows["training, with validation and checkpoints"].ours
    assert rows["training, with validation and checkpoints"].full == "not run"
    assert [costs.duration(s) for s in (0.42, 35.2, 125, 11040)] == ["0.4 s", "35 s", "2 min 5 s", "3 h 4 min"]
    assert [costs.size(b) for b in (12, 1_180_000, 343e6, 5e12)] == ["12 bytes", "1.18 MB", "343 MB", "5e+03 GB"]
