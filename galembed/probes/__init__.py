"""Probes: classes, numbers or votes for a whole store from a few labels, by linear models on its vectors."""

from galembed.probes.applying import apply_probe, predictions, stored_predictions
from galembed.probes.fitting import fit_probe, refit_probe
from galembed.probes.model import Probe, load_probe, save_probe
from galembed.probes.nuisances import nuisance_report
from galembed.probes.reports import ClassScore, NumberReport, NumberScore, ProbeReport, Report
from galembed.probes.scoring import evaluate_probe
from galembed.probes.suggesting import suggest

__all__ = [
    "ClassScore",
    "NumberReport",
    "NumberScore",
    "Probe",
    "ProbeReport",
    "Report",
    "apply_probe",
    "evaluate_probe",
    "fit_probe",
    "load_probe",
    "nuisance_report",
    "predictions",
    "refit_probe",
    "save_probe",
    "stored_predictions",
    "suggest",
]
