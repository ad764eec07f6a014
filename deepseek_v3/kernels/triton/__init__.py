"""Triton kernels and their launchers. Nothing imports this folder before a launch is wanted: triton is optional."""
