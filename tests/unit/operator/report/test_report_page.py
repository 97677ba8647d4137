"""report.html: what it shows, and that it is complete and safe without a network."""

import re
from html.parser import HTMLParser

import pytest
from graft.report.job import render_job
from pydantic import ValidationError
from worlds.report import document, old_document

SECTIONS = [
    "Loss",
    "Scores against the baselines",
    "Forgetting",
    "Memory and time",
    "Inference latency",
    "The update: spectrum and effective rank",
    "Representation change per layer",
    "Samples",
    "Recipe",
    "Provenance",
]


class Page(HTMLParser):
    """The elements, headings and text of an HTML page."""

    VOID = frozenset({"meta", "link", "br", "img", "use", "path"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize(
    "source", [document(), document("full"), document("promptTuning", analysis=None), old_document()]
)
def test_every_report_has_every_section(source: dict[str, object]) -> None:
    page = Page(render_job(source))
    assert page.headings == SECTIONS
    assert page.open == []  # every element is closed


@pytest.fixture(scope="module")
def html() -> str:
    return render_job(document())


def test_the_page_shows_what_was_measured(html: str) -> None:
    text = Page(html).text
    for expected in (
        "support 1.2.0",
        "LoRA",
        "Published",
        "81 %",
        "71 points better",
        "1,000 of 100,000",
        "4 GB",
        "80 s",
    ):
        assert expected in text, expected
    assert "0.2 worse" in text  # general/loss is 2.0, and 1.8 for the base model
    assert "sha256:train" in text and "torch 2.15.0" in text


def test_the_page_of_a_rejected_version_names_the_missed_gates() -> None:
    source = document(analysis=None)
    source["evaluation"]["rejected"] = ["exactMatch is 0.4, the gate asks for at least 0.5"]
    text = Page(render_job(source)).text
    assert "Rejected" in text and "Published" not in text
    assert "exactMatch is 0.4, the gate asks for at least 0.5" in text


def test_the_page_needs_no_network_and_no_script(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "link", "object", "embed", "img"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href"):
                assert (value or "").startswith(("#", "data:image/png;base64,")), value
    assert "@import" not in html
    addresses = set(re.findall(r"https?://[^\"'\s<)]+", html))
    assert all(address.startswith("http://www.w3.org/") for address in addresses)  # names of XML namespaces
    assert "default-src 'none'" in html


def test_html_in_a_text_is_escaped() -> None:
    attack = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    source = document(
        samples=[{"prompt": attack, "expected": attack, "answer": attack, "base/answer": attack, "suite": attack}],
        adapter=attack,
        metrics={f"{attack}/exactMatch": 0.5, f"base/{attack}/exactMatch": 0.25},
        hyperparameters={attack: attack},
        targetModules=[attack],
    )
    source["evaluation"]["rejected"] = [attack]
    source["environment"]["packages"] = {attack: attack}
    for matrix in source["analysis"]["update"]["matrices"]:
        matrix["name"] = matrix["kind"] = attack
    source["analysis"]["notes"] = [attack]
    html = render_job(source)
    page = Page(html)
    assert not page.named("script") and not page.named("img")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 10


def test_a_name_with_dollar_signs_is_not_rendered_as_a_formula() -> None:
    source = document(metrics={"cost$in$euros/f1": 0.5}, analysis=None)
    assert "cost$in$euros/f1" in Page(render_job(source)).text


def test_figures_have_a_text_alternative_and_tables_show_the_numbers(html: str) -> None:
    page = Page(html)
    figures = page.named("svg")
    assert len(figures) >= 8
    labels = [figure["aria-label"] for figure in figures if figure["role"] == "img"]
    assert len(set(labels)) == len(figures)
    assert "Training loss from 2 at step 1 to 0.105 at step 19" in labels
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert len(page.named("table")) >= 6


def test_figures_take_the_colour_of_the_page(html: str) -> None:
    assert "currentColor" in html and "prefers-color-scheme: dark" in html and "@media print" in html
    svg = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "#000000" not in svg and "#010203" not in svg


def test_the_page_of_a_model_with_many_layers_stays_small() -> None:
    source = document()
    update = source["analysis"]["update"]
    update["matrices"] = [m | {"layer": layer, "name": f"{m['kind']}.{layer}"} for layer in range(80) for m in update["matrices"][:3]]  # fmt: skip
    html = render_job(source)
    assert len(html) < 2_000_000
    assert Page(html).open == []


def test_an_update_of_zeros_is_no_error() -> None:
    source = document()
    for matrix in source["analysis"]["update"]["matrices"]:
        matrix |= {"singularValues": [0.0, 0.0], "norm": 0.0, "relativeNorm": 0.0, "effectiveRank": 0.0}
    assert "Every matrix" in Page(render_job(source)).text


def test_a_report_of_a_later_version_is_refused() -> None:
    with pytest.raises(ValidationError, match="upgrade Graft"):
        render_job(document(schemaVersion=3))


def test_scores_have_n_and_an_interval_and_old_reports_have_none(html: str) -> None:
    text = Page(html).text
    assert "69.3 to 88.9 %" in text  # Wilson, 0.81 of 60
    assert "0.1804 to 0.2196" in text and "50.2 to 69.8 %" in text
    old = Page(render_job(old_document())).text
    assert " to 7" not in old and "Small figures" not in old


def test_the_worst_answers_are_marked() -> None:
    answers = [
        {"prompt": "a", "expected": "b", "answer": "c", "metric": "exactMatch", "score": "0", "missed": "1 of 2"}
    ]
    answers += [
        answers[0] | {"answer": "b", "score": "1"},
        answers[0] | {"metric": "f1", "score": "0.42", "suite": "faq"},
    ]
    page = Page(render_job(document(samples=answers)))
    marks = [(attributes["class"] or "").split() for attributes in page.named("article")]
    assert marks == [["sample", "missed"], ["sample"], ["sample"]]
    for words in (
        "✗ missed: exactMatch 0. In all, 1 of 2 answers were missed",
        "✓ right",
        "partly right: f1 0.42",
        "answers of faq",
    ):
        assert words in page.text


def test_a_loss_that_falls_far_has_a_log_axis() -> None:
    flat = [{"step": step, "loss": 2.0 - step / 20} for step in range(1, 20)]
    assert "log axis" in render_job(document()) and "log axis" not in render_job(document(lossCurve=flat))


def test_the_page_shows_rates_norms_hardware_and_digests(html: str) -> None:
    page = Page(html)
    labels = [figure["aria-label"] for figure in page.named("svg")]
    assert "Learning rate and gradient norm by step. The largest gradient norm is 3" in labels
    assert "2 x NVIDIA H200 with 151 GB each" in page.text
    assert f"SHA-256 of adapter_model.safetensors{'ab' * 32}" in page.text.replace("\n", "")
    assert "digest of the version" not in page.text  # the manifest has the digest of this page
    assert "sha256:own" in Page(render_job(document(digest="sha256:own"))).text
