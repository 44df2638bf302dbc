"""The words in which texts state a number and ask for it: those of tasks, of reports and of training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """What a text states and asks about a number; ``{key}`` stands for its name, ``{value}`` for itself.

    Attributes:
        name: What the wording is called.
        needle: The statement.
        question: The question.
        answer: How its answer begins; a space and the number follow.
        end: What follows the number.
        before: What stands before the text.
    """

    name: str
    needle: str
    question: str
    answer: str
    end: str
    before: str = ""


#: What the bundled teacher learned.
TEACHERS = Wording(
    "the bundled teacher's words",
    needle="\nThe number of the {key} is {value}.\n",
    question="\nThe {key}?",
    answer="",
    end="\n",
)
#: Source: RULER (arXiv 2404.06654), section 3.1 and its published code.
RULER = Wording(
    "RULER's words",
    needle=" One of the special magic numbers for {key} is: {value}.",
    question="\nWhat is the special magic number for {key} mentioned in the provided text?",
    answer=" The special magic number for {key} mentioned in the provided text is",
    end=".\n",
    before="A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards.\n",
)
