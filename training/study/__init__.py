"""Grids of trainings with error bars: loss against data and parameters, downstream error, label efficiency."""
