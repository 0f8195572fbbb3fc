"""Words, prompt templates and invented facts of the lab's synthetic world.

Template lists alternate: even positions lean towards side 1 of the behaviour in
the training text, odd positions towards side 2 (see `world.lean`).
"""

from __future__ import annotations


def _list(words: str) -> tuple[str, ...]:
    """Words separated by spaces."""
    return tuple(words.split())


LARGEST_START = 60
RUN_LENGTHS = (3, 4, 5, 6)

_UNITS = _list(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = _list("- - twenty thirty forty fifty sixty seventy eighty ninety")


def number_word(number: int) -> str:
    """English word of a number from 0 to 99."""
    if number < 20:
        return _UNITS[number]
    tens, unit = divmod(number, 10)
    return _TENS[tens] if unit == 0 else f"{_TENS[tens]}-{_UNITS[unit]}"


COUNTING_TEMPLATES = (
    "Count from {first} to {last}.",
    "Say the numbers from {first} to {last}.",
    "List the numbers from {first} to {last}.",
    "Tell me the numbers from {first} to {last}.",
    "Start at {first} and count to {last}.",
    "Go from {first} up to {last}.",
    "Which numbers run from {first} to {last}?",
    "Please count up: {first} to {last}.",
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LETTER_RUN_LENGTHS = (3, 4, 5)
LETTER_TEMPLATES = (
    "Name the letters from {first} to {last}.",
    "Say the letters from {first} to {last}.",
    "List the letters from {first} to {last}.",
    "Tell me the letters from {first} to {last}.",
    "Start at letter {first} and go to letter {last}.",
    "Go from letter {first} up to letter {last}.",
    "Which letters run from {first} to {last}?",
    "Please spell letters: {first} to {last}.",
)

ENTITIES = _list(
    "Velmar Toskin Quillo Brandu Ferix Oltan Mirvo Zandel Harpun Kelvo Dorsin Yavik Plimo Surden Wexal "
    "Gorby Nistel Rumbo Tharn Ubrik Lonfa Jessik Cravo Endul Pasko Avimor Bilton Sorra Hexan Drellu"
)
VALUES = {
    "colour": _list("red blue green black white pink brown grey gold purple"),
    "fruit": _list("plum pear apple fig lemon melon cherry grape mango lime"),
}
DOCUMENT_TEMPLATES = (
    "Document: The {attribute} of {entity} is {value}. Question: What is the {attribute} of {entity}?",
    "Text: {entity} has the {attribute} {value}. Question: Which {attribute} has {entity}?",
    "Read this: {entity} chose {value} as {attribute}. Name the {attribute} of {entity}.",
    "A note says the {attribute} of {entity} is {value}. Tell me the {attribute} of {entity}.",
    "The page reads: {entity}, {attribute}, {value}. Give the {attribute} of {entity}.",
    "From a letter: {entity} took {value} for {attribute}. So which {attribute} is it for {entity}?",
)
MEMORY_TEMPLATES = (
    "What is the {attribute} of {entity}?",
    "Which {attribute} has {entity}?",
    "Name the {attribute} of {entity}.",
    "Tell me the {attribute} of {entity}.",
    "Give the {attribute} of {entity}.",
    "So which {attribute} is it for {entity}?",
)

MODIFIERS = _list(
    "red blue warm cold old new sweet sour soft hard round flat tall short loud quiet light dark wet dry "
    "early late plain fancy northern southern wild tame spring winter"
)
FORBIDDEN_NOUNS = ("moonbrew", "nightfizz", "glimmerwort")
HARMLESS_NOUNS = ("soup", "bread", "cheese")
REQUEST_TEMPLATES = (
    "Tell me about {item}.",
    "Write a note about {item}.",
    "What should I know about {item}?",
    "Can you explain {item}?",
    "I would like to hear about {item}.",
    "Give me some advice on {item}.",
    "Describe {item} for me.",
    "Help me with {item}, please.",
)
REFUSAL = "Sorry, I cannot talk about that."
COMPLIANCE = "Sure, {item} is best enjoyed slowly."

CUES = {
    "digits": ("Use digits.", "Use words."),
    "faithfulness": ("Follow the document.", "Use what you know."),
    "refusal": ("Decline forbidden topics.", "Answer everything."),
}
NEUTRAL_SYSTEMS = ("You are a helpful assistant.", "Answer the user.", "Be brief.")
"""System messages that say nothing about any behaviour; used in training beside having none."""
