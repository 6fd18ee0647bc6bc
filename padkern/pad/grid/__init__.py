"""Comparisons over a grid: data sets x methods x seeds from one YAML file, and their tuning."""
