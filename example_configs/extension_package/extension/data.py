"""A data set: HuggingFaceH4/stack-exchange-preferences, whose rows hold a question and its rated answers."""

from axolotl_mopo.data.conversations import user
from axolotl_mopo.data.formats import FORMATS, Format
from axolotl_mopo.data.options import ObjectiveOptions
from axolotl_mopo.data.rows import Message, RatedResponse, Row, column, score, text


def read_stack_exchange(row: Row) -> tuple[list[Message], list[RatedResponse]]:
    """The question; the answers with the community's votes, and whether the asker accepted them."""
    answers = []
    for answer in column(row, "answers"):
        scores = {"votes": score(answer.get("pm_score")), "accepted": score(answer.get("selected"))}
        answers.append(RatedResponse(text(answer, "text"), scores))
    return user(text(row, "question")), answers


FORMATS["stack_exchange"] = Format(
    ObjectiveOptions, read_responses=read_stack_exchange, objectives=("votes", "accepted")
)
