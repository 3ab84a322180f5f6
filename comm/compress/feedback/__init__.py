"""Error feedback: what each rank remembers of what it did not send, so that nothing is lost for good."""

from thinwire.comm.compress.feedback.classic import EF, NoFeedback
from thinwire.comm.compress.feedback.ef21 import EF21, EF21BC
from thinwire.comm.compress.feedback.protocol import Feedback, FeedbackSettings, Place
from thinwire.comm.compress.feedback.settings import AnyFeedback, build_feedback, parse_feedback

__all__ = [
    "EF",
    "EF21",
    "EF21BC",
    "AnyFeedback",
    "Feedback",
    "FeedbackSettings",
    "NoFeedback",
    "Place",
    "build_feedback",
    "parse_feedback",
]
