"""Gradient synthesis for LLM unlearning: computes one update from the forget and the retain gradient."""

from sago import distributed, monitor, reference
from sago.capture.buckets import GradientBuckets
from sago.core.report import SynthesisReport
from sago.rules import Rule, list_rules
from sago.synthesis import Plan, synthesize, synthesize_

__version__ = "0.1.0"

__all__ = [
    "GradientBuckets",
    "Plan",
    "Rule",
    "SynthesisReport",
    "distributed",
    "list_rules",
    "monitor",
    "reference",
    "synthesize",
    "synthesize_",
]
