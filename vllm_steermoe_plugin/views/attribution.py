"""An attributed text to look at: a page of HTML without scripts, and colours in the terminal."""

from __future__ import annotations

import html
from collections.abc import Sequence

from rich.text import Text

from expert_registry import Ranking
from vllm_steermoe_plugin.detection.attribution import AttributedToken

_RED, _BLUE = (178, 24, 43), (33, 102, 172)
"""Sides 1 and 2, as in the heat maps."""
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    127: 0x2421,
    **dict.fromkeys([*range(128, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD),
}
"""Signs for control characters: a text must not move the cursor or set the colours of the terminal that shows it, nor
the order of what stands around it."""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.7 system-ui, sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em;
       color: #111; background: #fff }}
pre {{ font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
pre span {{ border-radius: 2px }}
span {{ unicode-bidi: isolate }}
.key {{ padding: 0 .4em; color: #fff }}
</style></head><body>
<h1>{title}</h1>
<p><span class="key" style="background: rgb{red}">{side_1}</span>
<span class="key" style="background: rgb{blue}">{side_2}</span></p>
<p>Colour: mean over {layers} layers of the summed risk differences of the experts that each token's router
selected; full colour at {scale:.3f}. Point at a token for its number and its weightiest experts.</p>
<pre>{tokens}</pre>
</body></html>
"""


def attribution_html(tokens: Sequence[AttributedToken], ranking: Ranking) -> str:
    """A page of its own; all that comes from the text or the ranking is escaped."""
    scale = _scale(tokens)
    spans = []
    for token in tokens:
        if not token.text:
            continue
        red, green, blue = _RED if token.score > 0 else _BLUE
        share = min(abs(token.score) / scale, 1.0)
        names = [f"layer {e.layer} expert {e.expert}: {e.risk_difference:+.3f}" for e in token.experts]
        tip = html.escape("\n".join([f"{token.score:+.4f}", *names]), quote=True).replace("\n", "&#10;")
        colour = "; color: #fff" if share > 0.65 else ""
        spans.append(
            f'<span title="{tip}" style="background: rgba({red}, {green}, {blue}, {share:.2f}){colour}">'
            f"{html.escape(token.text.translate(_PICTURES))}</span>"
        )
    card = ranking.card
    return _PAGE.format(
        title=html.escape(f"{card.behaviour}: {card.model.id}"),
        side_1=html.escape(card.sides[0]),
        side_2=html.escape(card.sides[1]),
        red=_RED,
        blue=_BLUE,
        layers=len(ranking.shape.layers),
        scale=scale,
        tokens="".join(spans),
    )


def attribution_text(tokens: Sequence[AttributedToken]) -> Text:
    """The text with coloured backgrounds, for rich."""
    scale = _scale(tokens)
    shown = Text()
    for token in tokens:
        share = min(abs(token.score) / scale, 1.0)
        # From white to the side's colour, black or white upon it, so that it reads on any terminal.
        red, green, blue = (round(255 + (c - 255) * share) for c in (_RED if token.score > 0 else _BLUE))
        shown.append(
            token.text.translate(_PICTURES), style=f"{'white' if share > 0.5 else 'black'} on rgb({red},{green},{blue})"
        )
    return shown


def _scale(tokens: Sequence[AttributedToken]) -> float:
    """The largest absolute score of what is to be seen; 1 where all are zero."""
    return max((abs(token.score) for token in tokens if token.text), default=0.0) or 1.0
