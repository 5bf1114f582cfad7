"""Simulated surveys: drawn with GalSim, laid out as the Legacy Surveys, with Galaxy Zoo votes."""

from training.simulation.survey import SurveyFiles, simulate_survey

__all__ = ["SurveyFiles", "simulate_survey"]
