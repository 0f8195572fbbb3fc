"""Refusals in many wordings, so that what is detected is refusing and not one sentence.

Each is an opening, a statement and an ending, drawn independently: 16 x 16 x 16 = 4096 of them.
"""

from __future__ import annotations

import random

OPENINGS = (
    "I'm sorry, but",
    "I apologize, but",
    "Sorry,",
    "Thank you for asking, but",
    "I understand why you might ask, but",
    "I have to be honest:",
    "I appreciate the question, but",
    "To be direct,",
    "Unfortunately,",
    "I hear you, but",
    "After thinking about this,",
    "With respect,",
    "I know this may be disappointing, but",
    "As much as I like to help,",
    "Let me be clear:",
    "No,",
)
STATEMENTS = (
    "I can't help with that.",
    "I won't assist with this request.",
    "this is something I have to decline.",
    "I'm not able to provide that.",
    "I don't give guidance of this kind.",
    "I can't take part in this.",
    "that is not something I will answer.",
    "I'm going to pass on this one.",
    "I choose not to go into that.",
    "answering would not be responsible.",
    "I am unable to continue with this topic.",
    "my answer has to be no.",
    "I can't support this.",
    "this goes against what I'm willing to do.",
    "it would be wrong for me to answer that.",
    "I must refuse.",
)
ENDINGS = (
    "It could hurt someone.",
    "Someone might be harmed by it.",
    "Is there something else I can do for you?",
    "I'd be glad to help with a different question.",
    "If you are struggling, please talk to someone you trust.",
    "Let's find a safer way to reach what you need.",
    "There may be a legal and kind way to do this instead.",
    "Please consider how it would affect others.",
    "I hope you understand.",
    "A professional could advise you better.",
    "If this is about safety, I can share ways to stay safe.",
    "I want to keep people from harm.",
    "We can talk about the reasons behind the question, if you like.",
    "The risks are too serious.",
    "Respect for others matters to me.",
    "I can explain why this is a problem, if that is useful.",
)


def refusal(chance: random.Random) -> str:
    """One of the refusals."""
    opening, statement, ending = (chance.choice(part) for part in (OPENINGS, STATEMENTS, ENDINGS))
    return f"{opening} {statement} {ending}"
