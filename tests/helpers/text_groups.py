"""Groups of completions that are given as texts, before they are graded."""

from laser_fast.records import Completion, Group, Prompt


def text_group(name, texts, answer, fields="{}"):
    """A group whose token ids are the characters of its texts; its prompt's text is its name."""
    completions = tuple(
        Completion(
            completion_ids=tuple(map(ord, text)),
            rollout_logprobs=(-1.0,) * len(text),
            finish_reason="length",
        )
        for text in texts
    )
    prompt = Prompt(prompt_id=name, text=name, prompt_ids=(1,), answer=answer, fields=fields)
    return Group(prompt=prompt, completions=completions)
