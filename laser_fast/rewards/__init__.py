"""Completion text and gold answer in, reward out, in killable workers.

A reward of None means that grading failed (deadline, crash, a gold nobody can read): the
completion is dropped and counted, never treated as wrong.

Workers import this package, so importing it loads neither torch, pydantic nor math-verify.
"""

from laser_fast.rewards.grader import Grader, grade, grade_groups
from laser_fast.rewards.user import RewardError

__all__ = ["Grader", "RewardError", "grade", "grade_groups"]
