"""Rules that name failures, a file for each family. They read what instruments say, and cost no pass."""

from __future__ import annotations

from packext.diagnostics._verdict import Rule
from packext.diagnostics.rules.data import BatchTooLarge, BatchTooSmall, LabelNoise, Overfitting
from packext.diagnostics.rules.gradients import ExplodingGradients, NaNAhead, VanishingGradients
from packext.diagnostics.rules.layers import DeadReLUs, FrozenByMistake, LayerDoesNotLearn
from packext.diagnostics.rules.start import BadInitialisation, BadInputScaling, LossIgnoresInput
from packext.diagnostics.rules.step_size import EdgeOfStability, LearningRateTooHigh, LearningRateTooLow

#: What `Cockpit` hears unless told otherwise.
RULES: tuple[type[Rule], ...] = (
    LearningRateTooHigh, LearningRateTooLow, EdgeOfStability, ExplodingGradients, VanishingGradients, NaNAhead,
    DeadReLUs, LayerDoesNotLearn, FrozenByMistake, BadInputScaling, BadInitialisation, LossIgnoresInput, LabelNoise,
    Overfitting, BatchTooSmall, BatchTooLarge,
)  # fmt: skip

__all__ = [
    "RULES",
    "BadInitialisation",
    "BadInputScaling",
    "BatchTooLarge",
    "BatchTooSmall",
    "DeadReLUs",
    "EdgeOfStability",
    "ExplodingGradients",
    "FrozenByMistake",
    "LabelNoise",
    "LayerDoesNotLearn",
    "LearningRateTooHigh",
    "LearningRateTooLow",
    "LossIgnoresInput",
    "NaNAhead",
    "Overfitting",
    "VanishingGradients",
]
