"""Objectives of masked diffusion language models; torch alone is imported."""
