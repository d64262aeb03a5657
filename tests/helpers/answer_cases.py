"""Tables of graded answers as the cases of a parametrized test."""


def answer_cases(answers):
    """(text, gold, reward) of rows of a gold, texts that are right and texts that are wrong."""
    return [
        (text, gold, expected)
        for gold, *texts in answers
        for expected, given in zip((1.0, 0.0), texts, strict=True)
        for text in given
    ]
