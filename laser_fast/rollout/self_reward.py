"""The name that models served before 0.2 load the processor by; see score_processor.py."""

from laser_fast.rollout.score_processor import SelfScoreProcessor

__all__ = ["SelfScoreProcessor"]
