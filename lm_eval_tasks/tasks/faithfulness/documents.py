"""From the rows of the data sets to documents with a ready prompt. One function per set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from lm_eval_tasks.tasks.sources import load_rows
from vllm_steermoe_plugin.detection.rows import DataError, Row

LETTERS = "ABCDEFGHIJ"
_EXPERT = (
    "You are an expert in retrieval question answering. \n"
    "Please respond with the exact answer only. Do not be verbose or provide extra information.\n"
)
_UNKNOWN = "If there is no information available from the context, the answer should be 'unknown'.\n"
_CONFLICT = "If there is conflict information or multiple answers from the context, the answer should be 'conflict'.\n"


def documents(*, source: str, steermoe_data: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The test split of a set; see `sources` for where it is looked for.

    Args:
        source: of `BUILDERS`.
        steermoe_data: folder of the user's data files.
        _: what lm-eval passes besides: the task's metadata and the model arguments.

    Raises:
        DataError: the set is not to be had, or a row is not as its task needs it.
    """
    build = BUILDERS[source]
    rows = []
    for number, row in enumerate(load_rows(source, steermoe_data), start=1):
        try:
            rows.append({"id": str(number), **build(row)})
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{source}, row {number} is not as its task reads it: {error!r}") from None
    return {"test": Dataset.from_list(rows)}


def with_options(question: str, options: list[str]) -> str:
    """A question with its options under the letters A, B, ..."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([f"Question: {question}", *lines])


def _asked(task: str, context: str, question: str) -> str:
    """FaithEval's prompt (github.com/SalesforceAIResearch/FaithEval)."""
    return f"{_EXPERT}{task}Context: {context}\nQuestion: {question}\nAnswer:"


def _counterfactual(row: Row) -> Row:
    labels = [str(label) for label in row["choices"]["label"]]
    options = [str(option) for option in row["choices"]["text"]]
    if not 2 <= len(options) <= len(LETTERS) or len(labels) != len(options):
        raise ValueError(f"{len(options)} options")
    ask = with_options(row["question"], options)
    prompt = (
        f"Answer from the context only, even where you know better.\nContext: {row['context']}\n{ask}\n"
        "Give the letter of the right option and nothing else.\nAnswer:"
    )
    return {"prompt": prompt, "options": options, "label": labels.index(str(row["answerKey"]))}


def _unanswerable(row: Row) -> Row:
    return {"prompt": _asked(_UNKNOWN, row["context"], row["question"]), "answers": ["unknown"]}


def _inconsistent(row: Row) -> Row:
    return {"prompt": _asked(_CONFLICT, row["context"], row["question"]), "answers": ["conflict"]}


def _document(document: str, question: str) -> str:
    return (
        f"Document: {document}\nQuestion: {question}\n"
        "Answer from the document, in as few words as possible, with no explanation.\nAnswer:"
    )


def _cf_triviaqa(row: Row) -> Row:
    answers = [str(one["paragraph_reference"]["string"]) for one in row["annotation"]["answer"]]
    if not any(answers):
        raise ValueError("no answer")
    return {"prompt": _document(row["paragraph_text"], row["question_text"]), "answers": answers}


def _mquake(row: Row) -> Row:
    """The first edited fact as a sentence, and its own question."""
    edit = row["requested_rewrite"][0]
    sentence = f"{edit['prompt'].format(edit['subject'])} {edit['target_new']['str']}."
    return {
        "prompt": _document(sentence, edit["question"]),
        "answers": [str(edit["target_new"]["str"])],
        "memory": [str(edit["target_true"]["str"])],
    }


BUILDERS: dict[str, Callable[[Row], Row]] = {
    "faitheval_counterfactual": _counterfactual,
    "faitheval_unanswerable": _unanswerable,
    "faitheval_inconsistent": _inconsistent,
    "cf_triviaqa": _cf_triviaqa,
    "mquake": _mquake,
}
