"""Error feedback: what each rank remembers of what it did not send, so that nothing is lost for good."""

from thinwire.comm.compress.feedback.classic import EF, NoFeedback
from thinwire.comm.compress.feedback.dgc import DGC
from thinwire.comm.compress.feedback.econtrol import EControl
from thinwire.comm.compress.feedback.ef21 import EF21, EF21BC
from thinwire.comm.compress.feedback.ef21_variants import EF21PP, EF21SGDM
from thinwire.comm.compress.feedback.ef21_weighted import EF21W, SmoothnessEstimate, WeightedEF21
from thinwire.comm.compress.feedback.protocol import Feedback, FeedbackSettings, Place
from thinwire.comm.compress.feedback.settings import AnyFeedback, build_feedback, parse_feedback

__all__ = [
    "DGC",
    "EF",
    "EF21",
    "EF21BC",
    "EF21PP",
    "EF21SGDM",
    "EF21W",
    "AnyFeedback",
    "EControl",
    "Feedback",
    "FeedbackSettings",
    "NoFeedback",
    "Place",
    "SmoothnessEstimate",
    "WeightedEF21",
    "build_feedback",
    "parse_feedback",
]
