"""Instruments, a file for each family; no layer type's gradient and no sink is mentioned."""

from __future__ import annotations

from packext.diagnostics._instrument import Instrument
from packext.diagnostics.instruments.activations import ActivationScale, DeadUnits, InputScale, OutputScale
from packext.diagnostics.instruments.alpha import Alpha, UpdateCurvature
from packext.diagnostics.instruments.basic import Distance, GradNorm, Loss, ParamNorm, Time, UpdateSize
from packext.diagnostics.instruments.curvature import HessMaxEV, HessTrace, TICDiag, TICTrace
from packext.diagnostics.instruments.facts import BatchSize, IdleUnits, InitialScale, LearningRate, Untrained
from packext.diagnostics.instruments.histograms import GradHist1d, GradHist2d
from packext.diagnostics.instruments.noise import (
    CABS,
    EarlyStopping,
    GradSNR,
    InnerTest,
    MeanGSNR,
    NoiseScale,
    NormLayerNoiseScale,
    NormTest,
    OrthoTest,
    SampleNorms,
)
from packext.diagnostics.instruments.samples import SampleLosses, TargetRanks
from packext.diagnostics.instruments.spectra import EffectiveRank, NTKCondition

ECONOMY: tuple[type[Instrument], ...] = (
    Loss, Time, GradNorm, Distance, UpdateSize, Alpha, UpdateCurvature, NormTest, InnerTest, OrthoTest, NoiseScale,
    GradSNR, SampleNorms, GradHist1d, BatchSize, LearningRate, ParamNorm, SampleLosses, InputScale, OutputScale,
    IdleUnits, Untrained, InitialScale, TargetRanks,
)  # fmt: skip
BUSINESS = (*ECONOMY, HessTrace, TICDiag)
FULL = (*BUSINESS, HessMaxEV, GradHist2d)

#: The instruments of each level, from the cheapest to the dearest.
LEVELS = {"economy": ECONOMY, "business": BUSINESS, "full": FULL}

__all__ = [
    "CABS",
    "LEVELS",
    "ActivationScale",
    "Alpha",
    "BatchSize",
    "DeadUnits",
    "Distance",
    "EarlyStopping",
    "EffectiveRank",
    "GradHist1d",
    "GradHist2d",
    "GradNorm",
    "GradSNR",
    "HessMaxEV",
    "HessTrace",
    "IdleUnits",
    "InitialScale",
    "InnerTest",
    "InputScale",
    "LearningRate",
    "Loss",
    "MeanGSNR",
    "NTKCondition",
    "NoiseScale",
    "NormLayerNoiseScale",
    "NormTest",
    "OrthoTest",
    "OutputScale",
    "ParamNorm",
    "SampleLosses",
    "SampleNorms",
    "TICDiag",
    "TICTrace",
    "TargetRanks",
    "Time",
    "Untrained",
    "UpdateCurvature",
    "UpdateSize",
]
