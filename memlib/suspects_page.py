"""A page to go through suspected label errors by hand: one HTML file with its images inside, which needs no server.

The reader gives each suspect a verdict in any browser; the verdicts stay in that browser until they are saved as a
CSV file with a line an example.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from string import Template

import numpy as np
from jaxtyping import Int64, UInt8
from torch import Tensor

from memlib.errors import InputError
from memlib.forgotten_images import encode_png
from memlib.mislabels import NO_SUGGESTION, Mislabels

MOST = 200  # suspects on a page


def review_page(
    found: Mislabels,
    images: UInt8[Tensor, "n c h w"],
    ids: Int64[Tensor, " n"],
    *,
    class_names: Sequence[str],
    title: str,
    most: int = MOST,
) -> str:
    """Return an HTML page of the `most` most suspicious examples of a verdict, the most suspicious first.

    images: of all judged examples, and perhaps others, with 1 or 3 channels, un-augmented. ids: theirs, each once.
    class_names: `class_names[k]` is the name of label k. title: shown on top; names the CSV file, too.

    Raises:
        InputError: most is below 1, a suspect has no image, an id comes twice, or a label has no name.
    """
    if most < 1:
        raise InputError(f"most is {most}; show at least one suspect.")
    position = {example_id: i for i, example_id in enumerate(ids.tolist())}
    if len(position) < len(ids):
        raise InputError(f"ids names {len(ids) - len(position)} images twice; give each image an id of its own.")
    n_named, highest = len(class_names), int(max(found.assigned.max(), found.suggested.max()))
    if highest >= n_named:
        raise InputError(f"class_names has {n_named} names and the labels go up to {highest}; name every class.")
    suspects = np.argsort(found.rank)[:most].tolist()
    without = [i for i in found.example_ids[suspects].tolist() if i not in position]
    if without:
        raise InputError(f"example {without[0]} is a suspect and has no image; give the images it was judged with.")
    rows = "".join(
        _row(found, i, encode_png(images[position[int(found.example_ids[i])]]), class_names) for i in suspects
    )
    return _PAGE.substitute(
        title=escape(title),
        shown=f"{len(suspects):,} of {len(found.score):,} examples, by {escape(found.method)}",
        names=_in_script(list(class_names)),
        file=_in_script("".join(c if c.isalnum() else "-" for c in title).strip("-")),
        # What the browser keeps belongs to these suspects: a page of another run starts empty.
        key=_in_script(f"memlib-review-{hashlib.blake2b(rows.encode(), digest_size=8).hexdigest()}"),
        rows=rows,
    )


def _row(found: Mislabels, i: int, png: bytes, class_names: Sequence[str]) -> str:
    assigned, suggested = int(found.assigned[i]), int(found.suggested[i])
    name = escape(class_names[assigned])
    choices = [("keep", f"keep {name}")]
    if suggested != NO_SUGGESTION:
        choices.append(("suggested", f"take {escape(class_names[suggested])}"))
    choices += [("other", "another"), ("remove", "remove")]
    example = int(found.example_ids[i])
    buttons = "".join(
        f'<label><input type="radio" name="e{example}" value="{value}">{text}</label>' for value, text in choices
    )
    offered = "" if suggested == NO_SUGGESTION else str(suggested)
    return (
        f'<li data-id="{example}" data-assigned="{assigned}" data-suggested="{offered}">'
        f'<img alt="example {example}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<p><b>{name}</b>{' ' if not offered else f' &rarr; <b>{escape(class_names[suggested])}</b>?'}<br>"
        f"<small>rank {int(found.rank[i])}, example {example}, score {found.score[i]:.3g}</small></p>"
        f"<fieldset>{buttons}<select hidden></select></fieldset></li>\n"
    )


def _in_script(value: object) -> str:
    """Return a value as JSON that cannot end the script it stands in."""
    return json.dumps(value).replace("<", "\\u003c")


_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 0 1rem 3rem; color: #222; }
header { position: sticky; top: 0; background: #fff; padding: .5rem 0; border-bottom: 1px solid #ccc; }
h1 { font-size: 1.2rem; margin: 0; }
ol { list-style: none; padding: 0; display: grid; gap: 1rem; }
ol { grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
li { border: 1px solid #ccc; border-radius: 4px; padding: .75rem; }
li.decided { border-color: #0072b2; background: #f0f7fc; }
img { width: 8rem; height: 8rem; object-fit: contain; image-rendering: pixelated; background: #eee; }
fieldset { border: 0; padding: 0; margin: 0; }
label { display: block; }
p { margin: .25rem 0; }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>$shown. Assigned label &rarr; suggestion. <output></output> <button type="button">Save decisions as CSV</button></p>
</header>
<ol>
$rows</ol>
<script>
"use strict";
const names = $names, file = $file, key = $key;
const items = [...document.querySelectorAll("li")];
let decisions = {};
try { decisions = JSON.parse(localStorage.getItem(key)) ?? {}; } catch { /* kept for as long as the page is open */ }

function show() {
  for (const item of items) item.classList.toggle("decided", item.dataset.id in decisions);
  document.querySelector("output").textContent = Object.keys(decisions).length + " of " + items.length + " decided.";
}

for (const item of items) {
  const id = item.dataset.id, select = item.querySelector("select");
  names.forEach((name, label) => select.add(new Option(name, label)));
  const before = decisions[id];
  if (before) {
    item.querySelector('input[value="' + before.decision + '"]').checked = true;
    select.hidden = before.decision !== "other";
    if (before.decision === "other") select.value = before.label;
  }
  item.addEventListener("change", () => {
    const decision = item.querySelector("input:checked").value;
    select.hidden = decision !== "other";
    const label = { keep: item.dataset.assigned, suggested: item.dataset.suggested, other: select.value, remove: "" };
    decisions[id] = { decision, label: label[decision] };
    try { localStorage.setItem(key, JSON.stringify(decisions)); } catch { /* as above */ }
    show();
  });
}

function table() {
  const rows = items.filter((item) => item.dataset.id in decisions).map((item) => {
    const { decision, label } = decisions[item.dataset.id];
    return [item.dataset.id, item.dataset.assigned, item.dataset.suggested, decision, label].join(",");
  });
  return ["example_id,assigned,suggested,decision,label", ...rows].join("\\n") + "\\n";
}

document.querySelector("button").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([table()], { type: "text/csv" }));
  link.download = file + ".csv";
  link.click();
});
show();
</script>
</body>
</html>
""")
