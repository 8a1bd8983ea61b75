"""The page of `python -m data_pipelines.inspect`: tallies and views -> one HTML file, without scripts or outside resources.

Every string of a corpus goes through `safe`. The page's own policy (Content-Security-Policy) forbids scripts and requests too.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_pipelines.html_text import safe
from data_pipelines.views import PALETTE, DocumentView, End, Picture, Tally, Text, View, picture

if TYPE_CHECKING:
    from data_pipelines.stream import StreamSettings

SMALL = 160
"""Characters up to which a document with at most one image takes a cell of the grid, not a row."""
BESIDE = 300
"""Characters up to which a text stands beside the picture before it."""

Part = Text | Picture | End


def page(config: StreamSettings, steps: range, tallies: Sequence[Tally], views: Sequence[View]) -> str:
    """`tallies` are of all `steps`, `views` of the sequences to show."""
    facts = [
        f"corpus {safe(config.data.corpus)}",
        f"steps {steps.start:,} to {steps.stop - 1:,}",
        f"{config.train.global_batch} sequences a step",
        f"{config.packing.seq_len:,} tokens and at most {config.packing.max_images} images a sequence",
        f"packing {safe(config.packing.policy)}" + ("" if config.packing.isolate_documents else ", documents not isolated"),
        f"seed {config.seed}",
    ]
    palette = "".join(f".c{number} {{ --c: {value}; }}\n" for number, value in enumerate(PALETTE))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Packed sequences: {safe(config.data.corpus)}</title>
<style>
{STYLE}{palette}</style>
</head>
<body>
<main>
<h1>Packed sequences</h1>
<p class="facts">{" &middot; ".join(facts)}</p>
{summary(tallies, config.data.unit, config.packing.max_images)}
<h2>{len(views)} sequences, as the model sees them</h2>
<p class="legend"><span class="key scored">black text is predicted</span>
<span class="key unscored">grey text is read, but carries no loss</span>
<span class="key"><i class="chip text"></i>text</span>
<span class="key"><i class="chip image"></i>image tokens</span>
<span class="key"><i class="chip pad"></i>padding</span>
<span class="key"><span class="end">end</span>end-of-text token</span>
<span class="key">one colour, one document: it attends to nothing outside</span></p>
{"".join(map(sequence, views))}
</main>
</body>
</html>
"""


# ----------------------------------------------------------------------------------------------------------------- summary


def summary(tallies: Sequence[Tally], unit: str, max_images: int) -> str:
    sequences = round(sum(t.sequences for t in tallies))
    tokens, padding = sum(t.tokens for t in tallies), sum(t.padding for t in tallies)
    image_tokens, loss = sum(t.image_tokens for t in tallies), sum(t.loss_tokens for t in tallies)
    images = sum(t.images for t in tallies)
    cards = [
        (f"{sequences:,}", "sequences counted"),
        (f"{round(tokens):,}", "tokens, padding included"),
        (f"{images:,}", f"images, {images / sequences:.1f} a sequence"),
        (share(image_tokens, tokens), "image tokens"),
        (share(padding, tokens), "padding"),
        (share(loss, tokens), "of tokens carry a loss"),
    ]
    units = sum(t.units(unit) for t in tallies)
    rows = "".join(row(tally, tally.units(unit) / units if units else 0.0, max_images) for tally in tallies)
    return f"""<div class="cards">{"".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in cards)}</div>
<table>
<thead><tr><th>source</th><th class="n">sequences</th><th class="n">target</th><th class="n">realised</th>
<th>realised share of {unit}s, and the target as a line</th>
<th class="n">documents a sequence</th><th class="n">images a sequence</th>
<th class="n">text</th><th class="n">image tokens</th><th class="n">padding</th><th class="n">with loss</th></tr></thead>
<tbody>{rows}</tbody>
</table>"""


def row(tally: Tally, realised: float, max_images: int) -> str:
    each = max(tally.sequences, 1)
    kind = "" if tally.kind == tally.source else f'<span class="dim">{safe(tally.kind)}</span>'
    words = tally.tokens - tally.image_tokens - tally.padding
    cells = [
        f"{tally.documents / each:.1f}",
        f'{tally.images / each:.1f} <span class="dim">most {tally.most_images} of {max_images}</span>',
        share(words, tally.tokens),
        share(tally.image_tokens, tally.tokens),
        share(tally.padding, tally.tokens),
        share(tally.loss_tokens, tally.tokens),
    ]
    return f"""<tr><td>{safe(tally.source)}{kind}</td><td class="n">{number(tally.sequences)}</td>
<td class="n">{tally.target:.1%}</td><td class="n">{realised:.1%}</td>
<td><div class="ratio"><i style="width:{100 * realised:.2f}%"></i><u style="left:{100 * tally.target:.2f}%"></u></div></td>
{"".join(f'<td class="n">{text}</td>' for text in cells)}</tr>
"""


def number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "&ndash;"


# --------------------------------------------------------------------------------------------------------------- sequences


def sequence(shown: View) -> str:
    images = sum(len(document.pictures) for document in shown.documents)
    padding = shown.length - shown.used
    facts = [
        plural(sum(len(held.origins) for held in shown.documents), "document"),
        plural(images, "image"),
        f"{shown.used:,} of {shown.length:,} tokens",
        f"{padding / shown.length:.1%} padding",
        f"{shown.loss_tokens / shown.length:.1%} with loss",
    ]
    documents = "".join(document(number, held) for number, held in enumerate(shown.documents))
    return f"""<section>
<header><h3>step {shown.step:,} <span>slot {shown.slot}</span> <em>{safe(shown.source)}</em></h3>
<p>{" &middot; ".join(facts)}</p></header>
{bar(shown)}
<div class="documents">{documents}</div>
</section>
"""


def bar(shown: View) -> str:
    """The sequence to scale: a band a document, its image tokens darker, padding hatched."""
    bands = []
    for number, held in enumerate(shown.documents):
        pieces, at = [], held.start
        for part in held.pictures:
            pieces += [("text", part.start - at), ("image", part.tokens)]
            at = part.start + part.tokens
        pieces.append(("text", held.stop - at))
        inner = "".join(f'<i class="{kind}" style="flex-grow:{size}"></i>' for kind, size in pieces if size)
        title = safe(f"tokens {held.start} to {held.stop - 1}: {', '.join(held.origins)}")
        bands.append(
            f'<span class="band {tint(number)}" style="flex-grow:{held.stop - held.start}" title="{title}">{inner}</span>'
        )
    if padding := shown.length - shown.used:
        bands.append(
            f'<span class="band" style="flex-grow:{padding}" title="padding: {padding} tokens"><i class="pad"></i></span>'
        )
    return f'<div class="bar">{"".join(bands)}</div>'


def document(number: int, held: DocumentView) -> str:
    characters = sum(len(part.text) for part in held.parts if isinstance(part, Text))
    size = " small" if characters <= SMALL and len(held.pictures) <= 1 else ""
    parts = "".join(map(group, groups(held.parts)))
    origins = " &middot; ".join(map(safe, held.origins))
    return f"""<article class="{tint(number)}{size}"><div class="origin"><span>{origins}</span>
<span>{held.start}&ndash;{held.stop - 1}</span></div><div class="body">{parts}</div></article>
"""


def groups(parts: Sequence[Part]) -> list[list[Part]]:
    """Each picture with all that follows it up to the next one."""
    found: list[list[Part]] = [[]]
    for part in parts:
        if isinstance(part, Picture):
            found.append([])
        found[-1].append(part)
    return found


def group(parts: Sequence[Part]) -> str:
    """A picture and a short text stand side by side; a long text flows around and below."""
    pieces = list(map(piece, parts))
    characters = sum(len(part.text) for part in parts if isinstance(part, Text))
    if len(parts) > 1 and isinstance(parts[0], Picture) and characters <= BESIDE:
        return f'<div class="pair">{pieces[0]}<div>{"".join(pieces[1:])}</div></div>'
    return "".join(pieces)


def piece(part: Part) -> str:
    if isinstance(part, End):
        return '<span class="end">end</span>'
    if isinstance(part, Text):
        text = safe(part.text)
        return f'<span class="unscored">{text}</span>' if part.unscored else text
    height, width = part.pixels.shape[1:]
    buffer = io.BytesIO()
    picture(part.pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{safe(part.name)}">'
    return f'<span class="picture">{image}<small>image &times; {part.tokens}</small></span>'


def tint(number: int) -> str:
    return f"c{number % len(PALETTE)}"


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


STYLE = """
:root { color-scheme: light; --ink: #1f2430; --dim: #7b8494; --line: #e4e7ec; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 14px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; font-weight: 650; }
h2 { font-size: 18px; margin: 36px 0 6px; font-weight: 650; }
.facts { color: var(--dim); margin: 0 0 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-bottom: 16px; }
.cards div { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.cards b { display: block; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.cards span, .dim { color: var(--dim); font-size: 12px; }
table { width: 100%; border-collapse: separate; border-spacing: 0; background: #fff; border: 1px solid var(--line);
  border-radius: 10px; }
th, td { text-align: left; padding: 8px 12px; border-top: 1px solid var(--line); vertical-align: middle; }
thead th { border-top: 0; font-size: 12px; font-weight: 500; color: var(--dim); line-height: 1.3; vertical-align: bottom; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.n { white-space: normal; }
td .dim { display: block; }
.ratio { position: relative; height: 10px; min-width: 140px; background: #eef0f4; border-radius: 5px; }
.ratio i { position: absolute; inset: 0 auto 0 0; background: #4c78a8; border-radius: 5px; }
.ratio u { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--ink); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; color: var(--dim); font-size: 12px; margin: 0 0 14px; }
.key { display: inline-flex; align-items: center; gap: 6px; }
.key.scored { color: var(--ink); }
.chip { width: 18px; height: 10px; border-radius: 2px; --c: #4c78a8; }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px 18px; margin: 0 0 18px; }
section header { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline; gap: 4px 16px; }
h3 { margin: 0; font-size: 15px; font-weight: 650; }
h3 span { font-weight: 400; color: var(--dim); margin: 0 6px; }
h3 em { font-style: normal; font-weight: 500; background: #eef0f4; border-radius: 10px; padding: 2px 10px; font-size: 12px; }
section header p { margin: 0; color: var(--dim); font-size: 12px; font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 16px; gap: 2px; margin: 10px 0 14px; }
.band { display: flex; flex: 0 1 0; min-width: 0; border-radius: 3px; overflow: hidden; }
.band i { flex: 0 1 0; min-width: 0; height: 100%; }
.text { background: color-mix(in srgb, var(--c) 38%, white); }
.image { background: var(--c); }
.pad { flex-grow: 1 !important; background: repeating-linear-gradient(135deg, #e2e5ea 0 3px, #f6f7f9 3px 7px); }
.documents { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 10px; }
article { grid-column: 1 / -1; border-left: 4px solid var(--c); background: color-mix(in srgb, var(--c) 6%, white);
  border-radius: 4px 8px 8px 4px; padding: 8px 12px 10px; min-width: 0; }
article.small { grid-column: auto; }
.origin { display: flex; justify-content: space-between; gap: 12px; color: var(--dim); font-size: 11px; margin-bottom: 6px;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.origin span:last-child { white-space: nowrap; }
.body { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; columns: 3 320px; column-gap: 28px; }
article.small .body { columns: auto; }
.unscored { color: #a3abb8; }
.end { font-size: 10px; color: var(--dim); border: 1px solid #cfd4dc; border-radius: 4px; padding: 0 4px; margin-left: 4px;
  vertical-align: 1px; white-space: nowrap; }
.pair { display: flex; align-items: center; gap: 4px; break-inside: avoid; }
.picture { flex: none; display: inline-block; margin: 2px 8px 2px 0; vertical-align: middle; text-align: center;
  line-height: 1.2; }
.picture img { display: block; max-width: 168px; height: auto; border: 1px solid var(--line); border-radius: 4px;
  background: #fff; }
.picture small { color: #a3abb8; font-size: 10px; white-space: nowrap; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
