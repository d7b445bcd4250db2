"""Pruning: pruners, masks, statistics of the calibration data and the loop over layers."""
