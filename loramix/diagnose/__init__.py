"""Checks of the machine and the installation, and prediction of an engine's memory."""
