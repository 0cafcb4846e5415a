"""The page for reviewing suspected label errors: self-contained, complete, and safe with any class name."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from memlib.datasets import load_dataset
from memlib.errors import InputError
from memlib.mislabels import Mislabels
from memlib.results import create_results, open_results
from memlib.review import main
from memlib.runs import perform_run
from memlib.suspects_page import review_page

CPU = torch.device("cpu")
N = 6
IDS = np.array([11, 2**62, 7, 5, 9, 3])
IMAGES = torch.randint(0, 256, (N, 3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
FOUND = Mislabels(
    method="loss_rise",
    evidence="in_sample",
    example_ids=IDS,
    assigned=np.array([0, 1, 2, 0, 1, 2]),
    suggested=np.array([1, -1, 0, 2, 0, 1]),
    score=np.array([0.5, 4.0, 3.0, -1.0, 0.0, 3.5]),
    is_label_issue=np.array([True, True, True, False, False, True]),
)
NAMES = ("cat", "dog", '</script><b>"bird"')


class Page(HTMLParser):
    """The suspects of a page, and every tag in it."""

    def __init__(self, text):
        super().__init__()
        self.items, self.tags, self.addresses = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action")]
        if tag == "li":
            self.items.append({**given, "choices": []})
        elif tag == "img":
            self.items[-1]["image"] = given["src"]
        elif tag == "input":
            self.items[-1]["choices"].append(given["value"])


def page(**changes):
    given = {"images": IMAGES, "ids": torch.from_numpy(IDS), "class_names": NAMES, "title": "Digits & co", "most": 4}
    return review_page(FOUND, **{**given, **changes})


def test_it_shows_the_most_suspicious_first_each_with_its_own_image_and_labels():
    items = Page(page()).items
    assert [int(item["data-id"]) for item in items] == [2**62, 3, 7, 11]
    for item in items:
        i = IDS.tolist().index(int(item["data-id"]))
        head, _, content = item["image"].partition(",")
        assert head == "data:image/png;base64"
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
        assert np.array_equal(shown, IMAGES[i].permute(1, 2, 0).numpy())
        assert int(item["data-assigned"]) == FOUND.assigned[i]
        suggested = "" if FOUND.suggested[i] < 0 else str(FOUND.suggested[i])
        assert item["data-suggested"] == suggested
        assert item["choices"] == ["keep", *(["suggested"] if suggested else []), "other", "remove"]


def test_nothing_is_fetched_and_a_class_name_stays_text():
    text = page()
    found = Page(text)
    assert all(address.startswith("data:") for address in found.addresses)
    assert found.tags.count("script") == 1
    assert "default-src 'none'" in text
    assert text.count("</script>") == 1
    assert "&lt;/script&gt;&lt;b&gt;&quot;bird&quot;" in text
    assert "<h1>Digits &amp; co</h1>" in text


def test_what_a_browser_keeps_belongs_to_these_suspects():
    keys = [re.search(r"memlib-review-\w+", text).group() for text in (page(), page(), page(most=3))]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"most": 0}, "most is 0"),
        ({"images": IMAGES[:2], "ids": torch.from_numpy(IDS[:2])}, "example 3 is a suspect and has no image"),
        ({"ids": torch.zeros(N, dtype=torch.int64)}, "names 5 images twice"),
        ({"class_names": NAMES[:2]}, "class_names has 2 names and the labels go up to 2"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        page(**changes)


def test_the_command_writes_the_page_of_a_run_with_the_images_it_was_trained_on(small_run, tmp_path, capsys):
    store, digits = create_results(tmp_path / "results"), load_dataset("digits", image_size=16)
    run = replace(small_run, data=replace(small_run.data, limit=200))
    perform_run(run, digits, store, device=CPU)
    out = tmp_path / "review.html"
    command = [run.run_id, "--results", str(tmp_path / "results"), "--out", str(out), "--most", "7"]
    assert main([*command, "--method", "los"]) == 2
    assert "method of this run 'los' is not known" in capsys.readouterr().err
    assert main(["0" * 16, *command[1:]]) == 2
    assert f"run {'0' * 16} has no examples" in capsys.readouterr().err
    assert not out.exists()
    assert main(command) == 0
    written, planted = capsys.readouterr().out.splitlines()
    assert written == f"{out}: suspects by aum; open it in a browser"
    assert re.fullmatch(
        r"40 of the run's 200 labels were made wrong on purpose .* \(AUROC 0\.\d+\); .* train with --noise 0", planted
    )
    items = Page(out.read_text()).items
    assert len(items) == 7
    trained = {row["example_id"]: row for row in open_results(tmp_path / "results").read("examples").to_pylist()}
    position = {int(i): at for at, i in enumerate(digits.train.ids)}
    for item in items:
        example_id = int(item["data-id"])
        assert trained[example_id]["assigned"] == int(item["data-assigned"])
        shown = Image.open(io.BytesIO(base64.b64decode(item["image"].partition(",")[2])))
        assert np.array_equal(np.asarray(shown), digits.train.images[position[example_id], 0].numpy())


def test_the_page_of_a_run_on_other_images_is_refused(small_run, digits, tmp_path, capsys):
    store = create_results(tmp_path / "results")
    perform_run(small_run, digits, store, device=CPU)  # a part of what is called so
    assert main([small_run.run_id, "--results", str(tmp_path / "results"), "--out", str(tmp_path / "review.html")]) == 2
    assert "holds runs on other images that were also called digits" in capsys.readouterr().err
    assert not (tmp_path / "review.html").exists()
