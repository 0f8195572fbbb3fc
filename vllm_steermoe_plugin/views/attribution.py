"""An attributed text to look at: a page of HTML without scripts, and colours in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment
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
_PAGE = Environment(autoescape=True, keep_trailing_newline=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 16px/1.7 system-ui, sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em;
       color: #111; background: #fff }
pre { font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
pre span { border-radius: 2px }
span { unicode-bidi: isolate }
.key { padding: 0 .4em; color: #fff }
</style></head><body>
<h1>{{ title }}</h1>
<p><span class="key" style="background: rgb{{ red }}">{{ sides[0] }}</span>
<span class="key" style="background: rgb{{ blue }}">{{ sides[1] }}</span></p>
<p>Colour: mean over {{ layers }} layers of the summed risk differences of the experts that each token's router
selected; full colour at {{ "%.3f" % scale }}. Point at a token for its number and its weightiest experts.</p>
<pre>{% for token, share in tokens -%}
<span title="{{ "%+.4f" % token.score }}{% for e in token.experts %}
layer {{ e.layer }} expert {{ e.expert }}: {{ "%+.3f" % e.risk_difference }}{% endfor %}" style="background: rgba(
{{- (red if token.score > 0 else blue) | join(", ") }}, {{ "%.2f" % share }})
{%- if share > 0.65 %}; color: #fff{% endif %}">{{ token.text.translate(pictures) }}</span>
{%- endfor %}</pre>
</body></html>
""")


def attribution_html(tokens: Sequence[AttributedToken], ranking: Ranking) -> str:
    """A page of its own; all that comes from the text or the ranking is escaped."""
    scale, card = _scale(tokens), ranking.card
    return _PAGE.render(
        title=f"{card.behaviour}: {card.model.id}",
        sides=card.sides,
        red=_RED,
        blue=_BLUE,
        layers=len(ranking.shape.layers),
        scale=scale,
        pictures=_PICTURES,
        tokens=[(token, min(abs(token.score) / scale, 1.0)) for token in tokens if token.text],
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
